"""Functions that run in a fork of an interpreter which has imported what they import: as fresh as in a new one."""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import cloudpickle
import pytest

from rm.runtime.entry import load_error, modules_path, result_path
from rm.runtime.nursery import Nursery
from rm.runtime.preloading import Preloading, shadowed
from rm.runtime.processes import ATTEMPT_KEY, Launched, LaunchOutcome, RankProcess

HERE = sys.modules[__name__]


@pytest.fixture
def preloading() -> Iterator[Preloading]:
    mine = Preloading()
    yield mine
    mine.close()


def rank_of(attempt: Any, function: Callable[[], Any], number: int = 0, **env: str) -> RankProcess:
    """A rank that runs this function, as a runner would order it."""
    cloudpickle.register_pickle_by_value(HERE)
    payload, result = attempt.folder / "payload", attempt.folder / "result"
    payload.write_bytes(cloudpickle.dumps((function, (), {})))
    cloudpickle.unregister_pickle_by_value(HERE)
    arguments = str(payload), str(result)
    env = {**attempt.env, "RANK": str(number), "PYTHONUNBUFFERED": "1", **env}
    rank: RankProcess = attempt.rank(number, sys.executable, "-m", "rm.runtime.entry", *arguments, env=env)
    return replace(rank, entry=arguments)


async def ready(preloading: Preloading, *ranks: RankProcess) -> Nursery:
    """The nursery that has numpy, once it has."""
    preloading.learn(ranks[0], ["numpy", "json"])
    deadline = time.monotonic() + 20
    while (nursery := preloading.nursery(ranks)) is None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    ending = LOOPS[asyncio.get_running_loop()] = without_its_keeper(nursery)
    await anext(ending)
    return nursery


LOOPS: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncIterator[None]] = WeakKeyDictionary()


async def without_its_keeper(nursery: Nursery) -> AsyncIterator[None]:
    """The keeper that waits for the next rank has its ends in this loop, and another comes. `asyncio.run` ends this."""
    try:
        yield
    finally:
        if nursery._spare is not None:
            nursery._spare.close()
            nursery._spare = None
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def run(preloading: Preloading, *ranks: RankProcess) -> LaunchOutcome:
    """The ranks, from the preloaded interpreter: anything else is an error."""

    async def scenario() -> LaunchOutcome:
        nursery = await ready(preloading, *ranks)
        return await (await Launched.start("t.1", ranks, 5.0, nursery)).wait()

    return asyncio.run(scenario())


def value(attempt: Any) -> Any:
    found = cloudpickle.loads((attempt.folder / "result").read_bytes())
    assert "ok" in found, found
    return found["ok"]


def look() -> dict[str, Any]:
    already = "numpy" in sys.modules
    import numpy

    print("said")
    return {
        "already": already,
        "environ": dict(os.environ),
        "cwd": str(Path.cwd()),
        "path": list(sys.path),
        "argv": len(sys.argv),
        "files": sorted(int(each) for each in os.listdir("/proc/self/fd"))[:-1],
        "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "sigchld": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
        "random": (random.random(), float(numpy.random.rand())),
        "leader": os.getsid(0) == os.getpid(),
        "mark": Path("/proc/self/environ").read_bytes().count(os.environ[ATTEMPT_KEY].encode()),
        "threads": threading.active_count(),
    }


def test_it_finds_all_that_a_new_interpreter_would(attempt: Any, preloading: Preloading) -> None:
    outcomes, seen = [], []
    for _ in range(2):
        rank = rank_of(attempt, look)
        outcomes.append(run(preloading, rank))
        assert outcomes[-1].exits[0].code == 0, (attempt.folder / "0.err").read_text()
        seen.append(value(attempt))
    asyncio.run(fresh(attempt, rank))
    new = value(attempt)
    assert [each.pop("already") for each in (*seen, new)] == [True, True, False]
    assert len({each.pop("random") for each in (*seen, new)}) == 3
    new["environ"].pop("LC_CTYPE", None)  # set by an interpreter for itself
    for each in seen:
        each["environ"].pop("LC_CTYPE", None)
        assert each == new
    assert attempt.out(0) == "said\n" * 3
    assert modules_path(attempt.folder / "result").read_text() == "numpy"


async def fresh(attempt: Any, rank: RankProcess) -> LaunchOutcome:
    return await (await attempt.start([replace(rank, entry=None)], 5.0)).wait()


def test_it_is_found_by_its_mark_and_killed_with_all_it_started(attempt: Any, preloading: Preloading) -> None:
    def work() -> None:
        import subprocess

        Path("child").write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
        time.sleep(1000)

    async def scenario() -> None:
        rank = rank_of(attempt, work)
        launched = await Launched.start("t.1", [rank], 5.0, await ready(preloading, rank))
        await asyncio.to_thread(attempt.until, attempt.saw("child"))
        assert len(attempt.alive()) == 2
        await launched.stop(0.1)
        await launched.wait()
        assert not attempt.alive()

    asyncio.run(scenario())


def test_how_it_ends_is_passed_on(attempt: Any, preloading: Preloading) -> None:
    def leave() -> None:
        atexit.register(lambda: print("at exit", flush=True))
        threading.Thread(target=lambda: (time.sleep(0.1), print("thread", flush=True))).start()
        sys.exit(7)

    def diverge() -> None:
        raise ValueError("diverged")

    assert run(preloading, rank_of(attempt, leave)).exits[0].code == 7
    assert attempt.out(0) == "thread\nat exit\n"
    assert run(preloading, rank_of(attempt, diverge)).exits[0].code == 1
    error = cloudpickle.loads(result_path(attempt.folder / "result", 0).read_bytes())["error"]
    assert isinstance(load_error(error), ValueError)
    said = (attempt.folder / "0.err").read_text()
    assert "ValueError: diverged" in said
    assert "keeper" not in said
    assert "preloaded" not in said


def test_a_gang_of_two(attempt: Any, preloading: Preloading) -> None:
    outcome = run(
        preloading, *(rank_of(attempt, lambda: print(os.environ["RANK"]), number) for number in range(2))
    )
    assert [each.code for each in outcome.exits] == [0, 0]
    assert (attempt.out(0), attempt.out(1)) == ("0\n", "1\n")


def test_who_may_not_come_from_it(attempt: Any, preloading: Preloading) -> None:
    """Another environment; a command; a directory whose modules come first."""
    rank = rank_of(attempt, look)

    async def scenario() -> None:
        await ready(preloading, rank)
        assert preloading.nursery([rank_of(attempt, look, OMP_NUM_THREADS="3")]) is None
        assert preloading.nursery([rank, replace(rank, entry=None)]) is None
        assert preloading.nursery([rank]) is not None
        (attempt.folder / "numpy.py").touch()
        assert preloading.nursery([rank]) is None

    asyncio.run(scenario())


def test_what_is_small_is_not_preloaded_and_what_is_there_is_kept(
    attempt: Any, preloading: Preloading
) -> None:
    rank = rank_of(attempt, look)

    async def scenario() -> None:
        preloading.learn(rank, ["json"])
        assert preloading.nursery([rank]) is None
        preloading.learn(rank, ["numpy"])
        first = preloading._nursery
        preloading.learn(rank, ["numpy"])
        assert preloading._nursery is first
        preloading.learn(rank_of(attempt, look, SEED="1"), ["numpy"])
        assert preloading._nursery is not first

    asyncio.run(scenario())


def test_a_module_that_can_not_be_imported_is_left_to_the_function(attempt: Any) -> None:
    command = (sys.executable, "-m", "rm.runtime.preloaded", "no_such_module")
    nursery = Nursery(command, attempt.env | {ATTEMPT_KEY: "-" * 255})
    nursery.start()
    attempt.until(lambda: b"cloudpickle" in nursery.said(1 << 18))
    nursery.close()


def test_shadowing(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "train.py").touch()
    (tmp_path / "fast.cpython-311-x86_64-linux-gnu.so").touch()
    elsewhere = "/usr/lib/python3/{}"
    assert shadowed({"torch": elsewhere.format("torch/__init__.py")}, str(tmp_path))
    assert shadowed({"train": elsewhere.format("train.py")}, str(tmp_path))
    assert shadowed({"fast": elsewhere.format("fast.so")}, str(tmp_path))
    assert not shadowed({"numpy": elsewhere.format("numpy/__init__.py")}, str(tmp_path))
    own = {"torch": f"{tmp_path}/torch/__init__.py", "train": f"{tmp_path}/train.py"}
    assert not shadowed(own, str(tmp_path)), "that is where it was loaded from"
    assert shadowed({"numpy": "x"}, str(tmp_path / "nowhere")), "nothing is known of it"
