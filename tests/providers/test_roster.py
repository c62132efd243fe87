"""The file that says which nodes a cluster has: shared by processes of which any may die, removed with the cluster."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rm.errors import ClusterError
from rm.providers.roster import FILE, Node, Roster, RosterFile, locked


@pytest.fixture
def file(tmp_path: Path) -> RosterFile:
    return RosterFile(tmp_path / "cluster")


def test_what_was_changed_is_read_by_another(file: RosterFile) -> None:
    with file.changing(make=True) as roster:
        roster.nodes["n1"] = Node("gpu4", {"a": "b"}, "host", 1.5, ending=True)
        roster.ports = {"gcs": 1}
        roster.unclean = {"host": "mark"}
    assert RosterFile(file.directory).read() == Roster(
        nodes={"n1": Node("gpu4", {"a": "b"}, "host", 1.5, ending=True)},
        ports={"gcs": 1},
        unclean={"host": "mark"},
    )


def test_a_cluster_that_is_not_there_has_no_nodes_and_gets_no_directory(file: RosterFile) -> None:
    assert file.read() == Roster()
    with pytest.raises(FileNotFoundError), file.changing():
        pass
    assert not file.directory.exists()


def test_a_change_that_fails_changes_nothing(file: RosterFile) -> None:
    with file.changing(make=True) as roster:
        roster.nodes["kept"] = Node("t", {})
    with pytest.raises(RuntimeError), file.changing() as roster:
        roster.nodes.clear()
        raise RuntimeError
    assert list(file.read().nodes) == ["kept"]


def test_nobody_else_can_read_the_directory(file: RosterFile) -> None:
    with file.changing(make=True):
        pass
    assert file.directory.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"nodes": {"n": {"colour": 1}}}', '{"nodes": {}, "new": 1}']
)
def test_a_file_that_makes_no_sense_is_named(file: RosterFile, content: str) -> None:
    file.directory.mkdir()
    (file.directory / FILE).write_text(content)
    with pytest.raises(ClusterError, match=FILE):
        file.read()


def test_changes_of_several_threads_all_count(file: RosterFile) -> None:
    def enter(number: int) -> None:
        for each in range(10):
            with file.changing(make=True) as roster:
                roster.nodes[f"{number}-{each}"] = Node("t", {})

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(file.read().nodes) == 40


def test_a_holder_that_is_killed_lets_go(file: RosterFile) -> None:
    code = (
        "import sys, time; from pathlib import Path; from rm.providers.roster import RosterFile\n"
        "with RosterFile(Path(sys.argv[1])).changing(make=True) as roster:\n"
        "    roster.ports['half'] = 1; print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(file.directory)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGKILL)
        with file.changing() as roster:
            assert roster.ports == {}, "what it had not finished was written"
    finally:
        holder.kill()
        holder.communicate()


def test_who_waited_for_a_directory_that_was_removed_makes_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "d"
    waiting, entered = threading.Event(), threading.Event()
    flock = fcntl.flock

    def wait_for_it() -> None:
        with locked(directory, make=True):
            assert directory.exists()
            entered.set()

    def told(descriptor: int, operation: int) -> None:
        waiting.set()  # its directory is open: what is removed from here on is the one it waits for
        flock(descriptor, operation)

    with locked(directory, make=True):
        monkeypatch.setattr(fcntl, "flock", told)
        waiter = threading.Thread(target=wait_for_it)
        waiter.start()
        assert waiting.wait(10)
        directory.rmdir()
        directory.mkdir()  # the same name, another directory
    waiter.join(60)
    assert entered.is_set()


def test_a_directory_that_goes_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    is_dir = Path.is_dir

    def gone(self: Path) -> bool:  # `mkdir` found it there and asks what it is
        if self == directory:
            monkeypatch.setattr(Path, "is_dir", is_dir)
            directory.rmdir()
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", gone)
    with locked(directory, make=True):
        assert directory.exists()
    assert Path.is_dir is is_dir


def test_a_file_where_the_directory_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "d").touch()
    with pytest.raises(FileExistsError), locked(tmp_path / "d", make=True):
        pass


def test_it_is_removed_with_all_that_is_in_it(file: RosterFile) -> None:
    with file.changing(make=True):
        (file.directory / "node").mkdir()
    file.remove()
    assert not file.directory.exists()
    file.remove()


def test_no_lock_is_inherited_by_what_is_started_under_it(file: RosterFile) -> None:
    with file.held(make=True):
        child = subprocess.Popen(["sleep", "60"])
    try:
        here = os.stat(file.directory)
        fds = [os.stat(f"/proc/{child.pid}/fd/{each}") for each in os.listdir(f"/proc/{child.pid}/fd")]
        assert not any(os.path.samestat(here, each) for each in fds)
        with file.changing():
            pass
    finally:
        child.kill()
        child.wait()
    assert json.loads((file.directory / FILE).read_text())["nodes"] == {}
