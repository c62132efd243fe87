"""What travels by value."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rm.errors import ClusterError, InvalidSpec, PayloadTooLarge
from rm.packing import pack_directory, pack_function
from rm.runtime.workspace import unpack


def test_a_directory_travels_with_modes_and_without_what_is_ignored(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "deep" / "er").mkdir(parents=True)
    target.mkdir()
    (source / "deep" / "er" / "x.py").write_text("x = 1")
    (source / "run.sh").write_text("#!/bin/sh")
    (source / "run.sh").chmod(0o755)
    for name in (".git", "__pycache__", ".venv", "data"):
        (source / name).mkdir()
        (source / name / "big").write_text("no")
    (source / ".rayignore").write_text("data/\n*.tmp\n")
    (source / "a.tmp").write_text("no")
    unpack(pack_directory(source), target)
    found = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
    assert found == [".rayignore", "deep/er/x.py", "run.sh"]
    assert (target / "run.sh").stat().st_mode & 0o111


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    first = pack_directory(tmp_path)
    (tmp_path / "f").touch()
    assert pack_directory(tmp_path) == first


@pytest.mark.parametrize("name", ["missing", "file"])
def test_what_is_no_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidSpec, match="working_dir"):
        pack_directory(tmp_path / name)


def test_a_directory_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm.packing.MAX_WORKING_DIR_BYTES", 10)
    (tmp_path / "f").write_text("x" * 11)
    with pytest.raises(PayloadTooLarge, match=".rayignore"):
        pack_directory(tmp_path)


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "{outside}/evil", "./../evil", "../work-evil/x"])
def test_an_archive_that_would_leave_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    target = tmp_path / "work"
    target.mkdir()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name.format(outside=tmp_path), "x")
    with pytest.raises(ClusterError, match="outside"):
        unpack(buffer.getvalue(), target)
    assert [each.name for each in tmp_path.rglob("*")] == ["work"]


@pytest.mark.parametrize(
    "kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK], ids=oct
)
def test_an_archive_of_links_or_devices_is_refused(tmp_path: Path, kind: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo("way\x1b[2Jout")
        member.external_attr = (kind | 0o777) << 16
        archive.writestr(member, "/etc")
        archive.writestr("way\x1b[2Jout/passwd", "x")
    with pytest.raises(ClusterError, match="a link or a device") as caught:
        unpack(buffer.getvalue(), tmp_path)
    assert str(caught.value).isprintable(), "the member's name does nothing to a terminal"
    assert not list(tmp_path.iterdir())


def test_an_archive_gives_no_file_more_than_permissions(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo("run")
        member.external_attr = (stat.S_IFREG | 0o6755) << 16
        archive.writestr(member, "x")
    unpack(buffer.getvalue(), tmp_path)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o755, "neither setuid nor setgid"


def test_what_is_no_file_does_not_travel(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    for each in (source, target, tmp_path / "elsewhere"):
        each.mkdir()
    os.mkfifo(source / "pipe")
    (source / "directory").symlink_to(tmp_path / "elsewhere")
    (source / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "elsewhere" / "file").write_text("shared")
    (source / "file").symlink_to(tmp_path / "elsewhere" / "file")
    unpack(pack_directory(source), target)
    assert [each.name for each in target.rglob("*")] == ["file"]
    assert not (target / "file").is_symlink(), "a link to a file travels as the file"
    assert (target / "file").read_text() == "shared"


def test_a_function_of_a_module_that_is_installed_nowhere_travels_by_value(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def add(a, b):\n    return a + b\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import beside

        data = pack_function(beside.add, (1, 2), {})
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("beside", None)
    code = "import cloudpickle, sys; f, a, k = cloudpickle.load(sys.stdin.buffer); print(f(*a, **k))"
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, timeout=60)
    assert done.stdout.strip() == b"3", done.stderr
