"""The scratch directory of an attempt: fresh for each, whether it is made or was another's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rm.core.model import Kind
from rm.runtime.orders import RunOrder
from rm.runtime.workspace import EMPTIED_BYTES, NAMELESS_S, Spare, Workspace, clear_stale, spare_path


def order(number: int) -> RunOrder:
    return RunOrder(
        f"j{number}", 1, "abc", "n", 0, 1, 0, 1, 1, "127.0.0.1", 1, Kind.COMMAND, ("true",), "", "", "", {}, "3.11", 0,
        "/none", 1.0,
    )  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def used(root: Path, spare: Spare, number: int) -> Workspace:
    """One in which a rank has run that printed something."""
    workspace = Workspace(order(number), root, spare)
    workspace.create(None, None)
    workspace.log_path(0, "out").write_text("printed")
    workspace.log_path(0, "err").touch()
    return workspace


def test_the_next_attempt_has_the_emptied_directory_of_the_last_under_its_own_name(root: Path) -> None:
    spare = Spare()
    first = used(root, spare, 1)
    inode = first.path.stat().st_ino
    first.report_path(0).write_text("{}")
    first.ask_to_stop()
    first.payload.write_bytes(b"code")
    first.result.with_name("result.pkl.modules").write_text("torch")
    assert first.give_back()
    assert list(root.iterdir()) == [spare_path(root)]
    second = Workspace(order(2), root, spare)
    second.create(b"other", None)
    assert second.path.stat().st_ino == inode
    assert sorted(path.name for path in second.path.iterdir()) == [
        "payload.pkl", "rank-0.err", "rank-0.out", "runner.pid", "work",
    ]  # fmt: skip
    assert second.payload.read_bytes() == b"other"
    assert second.log_path(0, "out").read_text() == ""
    assert list(root.iterdir()) == [second.path]


def test_there_is_one_spare_at_most(root: Path) -> None:
    spare = Spare()
    first, second = used(root, spare, 1), used(root, spare, 2)
    assert first.give_back()
    assert not second.give_back()
    second.remove()
    assert list(root.iterdir()) == [spare_path(root)]


def _grow(workspace: Workspace) -> None:
    with workspace.log_path(0, "out").open("r+b") as file:
        file.truncate(EMPTIED_BYTES + 1)


CHANGES: dict[str, Callable[[Workspace], object]] = {
    "a file of its own": lambda each: (each.path / "left").touch(),
    "a directory of its own": lambda each: (each.path / "rank-1.out").mkdir(),
    "something in its directory": lambda each: (each.path / "work" / "left").touch(),
    "a link as its directory": lambda each: ((each.path / "work").rmdir(), (each.path / "work").symlink_to("/")),
    "a file as its directory": lambda each: ((each.path / "work").rmdir(), (each.path / "work").touch()),
    "its directory opened to all": lambda each: (each.path / "work").chmod(0o777),
    "a log that is a link": lambda each: (
        each.log_path(0, "out").unlink(), each.log_path(0, "out").symlink_to("/etc/hostname")
    ),
    "a log with another name elsewhere": lambda each: os.link(each.log_path(0, "out"), each.path.parent / "mine"),
    "a log that can be executed": lambda each: each.log_path(0, "out").chmod(0o755),
    "a log that its owner can't write": lambda each: each.log_path(0, "out").chmod(0o400),
    "a long log": _grow,
    "no directory": lambda each: (each.path / "work").rmdir(),
    "no owner": lambda each: (each.path / "runner.pid").unlink(),
    "another owner": lambda each: (each.path / "runner.pid").write_text("1"),
    "all of it closed": lambda each: each.path.chmod(0o500),
    "all of it open": lambda each: each.path.chmod(0o755),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_in_any_other_way_is_nobody_elses(root: Path, change: str) -> None:
    spare = Spare()
    workspace = used(root, spare, 1)
    CHANGES[change](workspace)
    assert not workspace.give_back()
    assert workspace.path.is_dir(), "for `remove`"
    workspace.remove()
    assert not workspace.path.exists()
    (root / "mine").unlink(missing_ok=True)
    fresh = Workspace(order(2), root, spare)
    fresh.create(None, None)
    assert sorted(path.name for path in fresh.path.iterdir()) == ["runner.pid", "work"]


def test_a_log_that_somebody_can_still_write_to_is_nobody_elses(root: Path) -> None:
    """A process that has left the attempt's tree, with its output still where it was."""
    workspace = used(root, Spare(), 1)
    with workspace.log_path(0, "out").open("a"):
        assert not workspace.give_back()
    with workspace.log_path(0, "out").open("r"):
        assert workspace.give_back(), "readers do no harm"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_what_belongs_to_another_user_is_nobody_elses(root: Path) -> None:
    workspace = used(root, Spare(), 1)
    os.chown(workspace.log_path(0, "out"), 12345, -1)
    assert not workspace.give_back()


def test_a_spare_that_is_gone_is_made_anew(root: Path) -> None:
    spare = Spare()
    assert used(root, spare, 1).give_back()
    Workspace(replace(order(1), job_id="x"), root, spare)  # asks for nothing yet
    (spare_path(root) / "work").rmdir()
    for path in spare_path(root).iterdir():
        path.unlink()
    spare_path(root).rmdir()
    workspace = used(root, spare, 2)
    assert (workspace.path / "work").is_dir()


def test_where_its_place_is_taken_the_spare_does_not_stay(root: Path) -> None:
    """Its name is that of a crashed attempt's directory, say."""
    spare = Spare()
    assert used(root, spare, 1).give_back()
    (root / order(2).key / "old").mkdir(parents=True)
    workspace = used(root, spare, 2)
    assert not (workspace.path / "old").exists()
    assert list(root.iterdir()) == [workspace.path]


def test_what_killed_runners_left_is_removed_and_what_living_ones_have_is_not(root: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name, owner in (("old", ended.pid), (f"spare-{ended.pid}", ended.pid), ("living", os.getpid())):
        (root / name).mkdir(parents=True)
        (root / name / "runner.pid").write_text(str(owner))
    (root / "being-made").mkdir()
    (root / "nobodys").mkdir()
    (root / "nobodys" / "stop").touch()
    os.utime(root / "nobodys", (0, time.time() - NAMELESS_S - 1))
    clear_stale(root)
    assert sorted(path.name for path in root.iterdir()) == ["being-made", "living"]


def test_it_is_not_looked_for_all_the_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workspace, "_look_at", 0.0)
    workspace = Workspace(order(1), root)
    assert workspace.is_look_due()
    assert not workspace.is_look_due()
    assert not Workspace(order(2), root).is_look_due()
