"""What the tests of this folder share: an attempt with its own key, and the proof that it leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rm.runtime import keeper
from rm.runtime.nursery import Nursery
from rm.runtime.processes import ATTEMPT_KEY, Launched, RankProcess, sweep

REPOSITORY = Path(__file__).parents[2]

DAEMON = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
        os.rename(sys.argv[1] + ".new", sys.argv[1])
        time.sleep(1000)
    os._exit(0)
os.wait()
"""
"""Leaves a grandchild in a session of its own that ignores SIGTERM; its pid is then in the file argv[1]."""


def until(condition: Callable[[], Any], deadline_s: float = 30.0) -> float:
    """Wait until the condition holds; the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < deadline_s, f"did not come true within {deadline_s} s"
        time.sleep(0.005)
    return time.monotonic() - began


def gone(pid: int) -> bool:
    """Whether the process has ended; init may reap its own zombies when it likes."""
    process = keeper.read_process(pid)
    return process is None or not process.alive


class Attempt:
    """An attempt under test: makes ranks that carry its mark, and knows which processes carry it."""

    until = staticmethod(until)
    gone = staticmethod(gone)

    def __init__(self, folder: Path) -> None:
        self.key = f"test-{uuid.uuid4().hex}.1"
        self.folder = folder
        self.nursery = Nursery()
        self._ending: AsyncIterator[None] | None = None
        self.env = {**os.environ, ATTEMPT_KEY: self.key, "PYTHONPATH": str(REPOSITORY)}

    async def start(self, procs: Sequence[RankProcess], grace_s: float) -> Launched:
        """The ranks, started by a keeper of this attempt's nursery, which ends with the event loop."""
        if self._ending is None:
            self._ending = self._end_nursery()
            await anext(self._ending)
        return await Launched.start("t.1", procs, grace_s, self.nursery)

    async def _end_nursery(self) -> AsyncIterator[None]:
        """A keeper that waits for the next attempt has its ends in the loop. `asyncio.run` ends what is like this."""
        try:
            yield
        finally:
            self._ending = None
            self.nursery.close()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def rank(self, number: int, *argv: str, **changes: Any) -> RankProcess:
        """A rank that runs this command, its output in the attempt's folder."""
        out, err = (str(self.folder / f"{number}.{name}") for name in ("out", "err"))
        fields: dict[str, Any] = {"env": self.env, "cwd": str(self.folder), "stdout": out, "stderr": err}
        return RankProcess(number, argv, **(fields | changes))

    def python(self, number: int, code: str, *args: str, **changes: Any) -> RankProcess:
        """A rank that runs this Python code."""
        return self.rank(number, sys.executable, "-I", "-S", "-c", code, *args, **changes)

    def daemon(self, number: int, then: str = "") -> RankProcess:
        """A rank that leaves a daemon behind (`daemon_pid`), then does what `then` says."""
        return self.python(number, DAEMON + then, str(self.folder / "daemon"))

    def daemon_pid(self) -> int:
        """The pid of the daemon, once it is there."""
        until((self.folder / "daemon").exists)
        return int((self.folder / "daemon").read_text())

    def out(self, number: int) -> str:
        return (self.folder / f"{number}.out").read_text()

    def alive(self) -> list[int]:
        """Every living process that carries the mark of this attempt."""
        mark = f"{ATTEMPT_KEY}={self.key}".encode()
        found = []
        for pid in keeper.all_pids():
            try:
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(pid)
            except OSError:
                continue
        return found

    def saw(self, name: str) -> Callable[[], bool]:
        """Whether a rank has made this file in the attempt's folder."""
        return (self.folder / name).exists


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Attempt]:
    """An attempt of which nothing may be alive when the test ends."""
    mine = Attempt(tmp_path)
    yield mine
    left = mine.alive()
    mine.nursery.close()
    sweep(mine.key)
    assert not left


def _open_files() -> dict[str, str]:
    """What this process has open, but for the descriptor that lists it."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except OSError:
            continue
    return found


def _children() -> list[keeper.Process]:
    """The direct children of this process. What they leave behind would become one too, or be found by its mark."""
    return [each for each in keeper.descendants(os.getpid()) if each.parent == os.getpid()]


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """No child, zombie or not, and no file descriptor is left by any test.

    A server that another test of this run keeps is a child too, and comes and goes below that child as it likes.
    """
    gc.collect()
    before = _open_files()
    servers = {child.pid for child in _children()}
    yield
    gc.collect()
    assert not [(child.pid, child.state) for child in _children() if child.pid not in servers]
    assert not _open_files().items() - before.items()
