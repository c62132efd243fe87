"""Who else on a machine or a shared disk may read, or could have prepared, the files that we use."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rm.core.model import Kind
from rm.errors import ClusterError
from rm.ledger import Ledger
from rm.runtime.local import LocalRay
from rm.runtime.orders import RunOrder
from rm.runtime.token_file import exposed_token
from rm.runtime.workspace import Workspace
from rm.store import FileStore


@pytest.fixture
def open_umask():
    """What a careless user's shell may have: whoever makes a file must say that it is private."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("first", ["ledger", "store", "local ray"])
def test_the_home_is_private_whoever_makes_it(tmp_path: Path, open_umask: None, first: str) -> None:
    home = tmp_path / "home"
    if first == "ledger":
        Ledger.open(f"sqlite:///{home}/ledger.sqlite").close()
        assert mode(home / "ledger.sqlite") == 0o600
    elif first == "store":
        FileStore(home, 100).put_blob(b"x")
        assert {mode(each) for each in home.rglob("*") if each.is_file()} == {0o600}
    else:
        LocalRay("key", str(tmp_path))._claim(home / "local-ray.json")
    assert mode(home) == 0o700


@pytest.mark.parametrize(
    ("permissions", "word"),
    [(0o600, ""), (0o400, ""), (0o640, "mode 0640"), (0o604, "mode 0604"), (0o620, "mode 0620")],
)
def test_a_token_file_that_others_may_read_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permissions: int, word: str
) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("s3cret")
    token.chmod(permissions)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    said = exposed_token()
    assert (word in said) if word else not said
    assert "s3cret" not in said
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert exposed_token() == "", "another file is read, and there is none"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert exposed_token() == said
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert exposed_token() == "", "no file is read"


@pytest.fixture
def order(tmp_path: Path) -> RunOrder:
    checkpoints = tmp_path / "checkpoints" / "abc" / "j1"
    return RunOrder(
        "j1", 1, "abc", "n", 0, 1, 0, 1, 1, "127.0.0.1", 1, Kind.COMMAND, ("true",), "", "", "", {}, "3.11", 0,
        str(checkpoints), 1.0,
    )  # fmt: skip


def test_scratch_is_private_and_its_name_no_way_out(
    tmp_path: Path, order: RunOrder, open_umask: None
) -> None:
    workspace = Workspace(order, tmp_path / "scratch")
    workspace.create(b"payload", None)
    assert mode(tmp_path / "scratch") == 0o700
    assert workspace.payload.read_bytes() == b"payload"


def test_scratch_that_somebody_else_laid_out_is_refused(tmp_path: Path, order: RunOrder) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "scratch").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ClusterError, match="set TMPDIR"):
        Workspace(order, tmp_path / "scratch").create(None, None)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's directory")
def test_another_users_scratch_is_refused(tmp_path: Path, order: RunOrder) -> None:
    (tmp_path / "scratch").mkdir()
    os.chown(tmp_path / "scratch", 12345, -1)
    with pytest.raises(ClusterError, match="another user's"):
        Workspace(order, tmp_path / "scratch").create(None, None)
