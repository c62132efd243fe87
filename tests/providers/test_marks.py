"""Ending a node: all that carries its mark, and what descends from it; and nothing else, whoever started it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from probes import wait_until

from rm.providers import stop
from rm.providers.surroundings import NODE
from rm.runtime.local_processes import belongs, end, members

FORK = "import subprocess, sys; subprocess.run(['sleep', '60'], env=eval(sys.argv[1]))"
Start = Callable[..., subprocess.Popen[bytes]]


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process with a mark, or the command `words`."""
    started: list[subprocess.Popen[bytes]] = []

    def one(mark: str, *words: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, NODE: mark}
        if not mark:
            environment.pop(NODE)
        started.append(subprocess.Popen(words or ("sleep", "60"), env=environment))
        return started[-1]

    yield one
    for each in started:
        for child in psutil.Process(each.pid).children() if each.poll() is None else []:
            child.kill()
        each.kill()
        each.wait()


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        ("/a/c/n", "/a/c/n", True),
        ("/a/c/n", "/a/c", True),
        ("/a/c2/n", "/a/c", False),
        ("/a/c/n2", "/a/c/n", False),
    ],
)
def test_a_mark_belongs_to_its_node_and_its_cluster(value: str, key: str, expected: bool) -> None:
    assert belongs(value, key) == expected


def test_only_this_nodes_processes_end(start: Start, tmp_path: Path) -> None:
    ours = [start(f"{tmp_path}/n1"), start(f"{tmp_path}/n1")]
    others = [start(f"{tmp_path}/n12"), start(f"{tmp_path}-/n1"), start(f"{tmp_path}"), start("")]
    end(f"{tmp_path}/n1", NODE)
    assert all(each.wait(30) < 0 for each in ours)
    assert all(each.poll() is None for each in others)
    end(str(tmp_path), NODE)
    assert [each.poll() is None for each in others] == [False, True, False, True]


def test_a_descendant_without_a_mark_ends_too_and_one_of_another_node_lives(
    start: Start, tmp_path: Path
) -> None:
    head, worker = f"{tmp_path}/head", f"{tmp_path}/worker"
    bare = start(head, sys.executable, "-c", FORK, "{'PATH': '/usr/bin:/bin'}")
    launched = start(head, sys.executable, "-c", FORK, repr({"PATH": "/usr/bin:/bin", NODE: worker}))
    children = [
        wait_until(lambda each=each: psutil.Process(each.pid).children()) for each in (bare, launched)
    ]
    wait_until(lambda: [each.name() for (each,) in children] == ["sleep", "sleep"])
    (lost,), (kept,) = children
    assert {each.pid for each in members(head, NODE)} == {bare.pid, lost.pid, launched.pid}
    end(head, NODE)
    assert (lives(lost), lives(kept)) == (False, True)
    end(worker, NODE)
    assert not lives(kept)


def test_who_ignores_sigterm_is_killed(start: Start, tmp_path: Path) -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    code = f"import signal, time; {ignore}; print('ready', flush=True); time.sleep(60)"
    stubborn = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, NODE: f"{tmp_path}/n"}
    )
    assert stubborn.stdout is not None
    assert stubborn.stdout.readline() == b"ready\n"
    end(f"{tmp_path}/n", NODE)
    assert stubborn.wait(30) < 0
    stubborn.stdout.close()


def test_stop_ends_the_node_but_not_the_shell_that_asked(start: Start, tmp_path: Path) -> None:
    sleeper, neighbour = start(f"{tmp_path}/n1"), start(f"{tmp_path}/n2")
    command = f"{sys.executable} -m rm.providers.stop && echo done"
    asked = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, NODE: f"{tmp_path}/n1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.stdout == "done\n", asked.stderr
    assert sleeper.wait(30) < 0
    assert neighbour.poll() is None
    assert stop.main(["--cluster", "--mark", f"{tmp_path}/n1"]) == 0
    assert neighbour.wait(30) < 0


def test_stop_without_a_mark_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(NODE, raising=False)
    assert stop.main([]) == 2
    assert NODE in capsys.readouterr().err
