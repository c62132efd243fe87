"""Whoever dies, and however user code tries to stay: nothing of an attempt outlives it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rm.runtime import keeper, nursery, processes
from rm.runtime.processes import Launched, LaunchOutcome, sweep

RUNNER = """
import asyncio, json, sys, time
from rm.runtime.nursery import Nursery
from rm.runtime.processes import Launched, RankProcess

async def main():
    procs = [RankProcess(**{**each, "argv": tuple(each["argv"])}) for each in json.loads(sys.argv[1])]
    scratch, *minds = json.loads(sys.argv[2])
    nursery = Nursery(minds=minds)
    launched = await Launched.start("t.1", procs, 60.0, nursery, [scratch])
    print(json.dumps(launched.keeper_pids), flush=True)
    await launched.wait()
    print("ended", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


SHORT_LIVED = """
import asyncio, json, os, sys
from rm.runtime.nursery import Nursery
from rm.runtime.processes import Launched, RankProcess

async def main():
    procs = [RankProcess(**{**each, "argv": tuple(each["argv"])}) for each in json.loads(sys.argv[1])]
    nursery = Nursery()
    nursery.start()
    print(nursery._process.pid, flush=True)
    starting = asyncio.create_task(Launched.start("t.1", procs, 60.0, nursery, json.loads(sys.argv[2])))
    for _ in range(int(sys.argv[3])):
        await asyncio.sleep(0)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


def outcome_after(attempt: Any, victims: list[int], number: int) -> tuple[LaunchOutcome, int]:
    """Two ranks, one with a daemon; signal keeper (0) and guard (1) as told; the outcome, and the daemon."""

    async def scenario() -> tuple[LaunchOutcome, int]:
        ranks = [attempt.daemon(0, "time.sleep(1000)"), attempt.rank(1, "sleep", "1000")]
        launched = await attempt.start(ranks, 0.3)
        daemon = await asyncio.to_thread(attempt.daemon_pid)
        pids = launched.keeper_pids
        for victim in victims:
            os.kill(pids[victim], number)
        return await asyncio.wait_for(launched.wait(), 20), daemon

    return asyncio.run(scenario())


# --- user code that leaves something -----------------------------------------------------------------------


def test_a_daemon_dies_when_its_rank_has_ended(attempt: Any) -> None:
    async def scenario() -> LaunchOutcome:
        launched = await attempt.start([attempt.daemon(0)], 60.0)
        outcome = await launched.wait()
        assert not attempt.alive()
        return outcome

    outcome = asyncio.run(scenario())
    assert [end.code for end in outcome.exits] == [0]
    assert outcome.leftovers_killed == 1
    assert outcome.stuck == ()


def test_a_daemon_lives_as_long_as_any_rank(attempt: Any) -> None:
    async def scenario() -> LaunchOutcome:
        waits = attempt.rank(1, "sh", "-c", "while [ ! -e go ]; do sleep 0.01; done")
        launched = await attempt.start([attempt.daemon(0), waits], 60.0)
        daemon = await asyncio.to_thread(attempt.daemon_pid)
        await asyncio.to_thread(attempt.until, lambda: attempt.gone(launched.pids[0]))
        assert daemon in attempt.alive()
        (attempt.folder / "go").touch()
        return await launched.wait()

    assert asyncio.run(scenario()).leftovers_killed == 1


def test_many_leftovers_in_a_deep_tree(attempt: Any) -> None:
    """Each level is handed to the keeper only when the one above has died."""
    code = "import os, time\nfor _ in range(20):\n  if os.fork():\n    os.setsid() if _ else 0\n    break\n"
    code += "else: open('deep', 'w')\nif _ == 0:\n  while not os.path.exists('deep'): time.sleep(.01)\n"
    code += "else: time.sleep(1000)\n"

    async def scenario() -> LaunchOutcome:
        return await (await attempt.start([attempt.python(0, code)], 60.0)).wait()

    outcome = asyncio.run(scenario())
    assert [end.code for end in outcome.exits] == [0]
    assert outcome.leftovers_killed == 20


def test_a_leftover_whose_first_thread_has_ended_is_found(attempt: Any) -> None:
    """It looks like a zombie, but its other threads run on."""
    code = """import ctypes, os, threading, time
child = os.fork()
if child == 0:
    threading.Thread(target=time.sleep, args=[1000]).start()
    ctypes.CDLL(None).pthread_exit(None)
while " Z " not in open(f"/proc/{child}/stat").read():
    time.sleep(.01)
"""

    async def scenario() -> LaunchOutcome:
        return await (await attempt.start([attempt.python(0, code)], 60.0)).wait()

    outcome = asyncio.run(scenario())
    assert [end.code for end in outcome.exits] == [0], (attempt.folder / "0.err").read_text()
    assert outcome.leftovers_killed == 1
    assert outcome.stuck == ()


# --- runner, guard and keeper die --------------------------------------------------------------------------


@pytest.mark.parametrize("also", [None, 0, 1], ids=["alone", "with the keeper", "with the guard"])
def test_runner_killed(attempt: Any, also: int | None) -> None:
    """Alone; with the guard, which is what Ray does when it ends an actor; with the keeper."""
    ranks = [attempt.daemon(0, "time.sleep(1000)"), attempt.rank(1, "sleep", "1000")]
    order = json.dumps([asdict(rank) | {"env": {processes.ATTEMPT_KEY: attempt.key}} for rank in ranks])
    env = {name: value for name, value in attempt.env.items() if name != processes.ATTEMPT_KEY}
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, order, '["/no-such"]'], stdout=subprocess.PIPE, env=env
    )
    with runner:
        assert runner.stdout is not None
        pids = json.loads(runner.stdout.readline())
        attempt.daemon_pid()
        assert len(attempt.alive()) == 3
        if also is not None:
            os.kill(pids[also], signal.SIGKILL)
        runner.kill()
        attempt.until(lambda: not attempt.alive(), 1.0)
    attempt.until(lambda: all(map(attempt.gone, pids)))


def directories(attempt: Any) -> list[Path]:
    """Those that are to go with the runner."""
    found = [attempt.folder / "scratch", attempt.folder / "spare"]
    for each in found:
        each.mkdir()
        (each / "file").touch()
    return found


@pytest.mark.parametrize("line", ["sleep 1000", "true"], ids=["during an attempt", "between two"])
def test_the_directories_of_a_killed_runner_go_with_it(attempt: Any, line: str) -> None:
    left = directories(attempt)
    order = json.dumps([asdict(attempt.rank(0, "sh", "-c", line))])
    env = {name: value for name, value in attempt.env.items() if name != processes.ATTEMPT_KEY}
    command = [sys.executable, "-c", RUNNER, order, json.dumps([str(each) for each in left])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as runner:
        assert runner.stdout is not None
        pids = json.loads(runner.stdout.readline())
        if line == "true":
            assert runner.stdout.readline() == b"ended\n"
        assert all(each.exists() for each in left), "as long as it lives it does so itself"
        runner.kill()
    attempt.until(lambda: all(map(attempt.gone, pids)))
    assert not any(each.exists() for each in left)


@pytest.mark.parametrize("turns", [6, 8, 10, 12])
def test_an_order_is_not_begun_when_its_runner_has_died_since(attempt: Any, turns: int) -> None:
    """Nobody would be left to kill what it starts: it dies while its keeper comes up, with the order on its way."""
    scratch = attempt.folder / "scratch"
    scratch.mkdir()
    for number in range(300):
        (scratch / str(number)).touch()
    order = json.dumps([asdict(attempt.rank(0, "bash", "-c", "setsid sleep 1000 & sleep 1000"))])
    env = {name: value for name, value in attempt.env.items() if name != processes.ATTEMPT_KEY}
    command = [sys.executable, "-c", SHORT_LIVED, order, json.dumps([str(scratch)]), str(turns)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as runner:
        assert runner.stdout is not None
        keepers = int(runner.stdout.readline())
    assert runner.returncode == -signal.SIGKILL
    attempt.until(lambda: attempt.gone(keepers))
    time.sleep(0.3)  # what is begun too late is begun by now
    attempt.until(lambda: not attempt.alive(), 1.0)


@pytest.mark.parametrize("when", ["during", "after", "by a signal"])
def test_a_living_runners_directories_are_its_own_whoever_it_sends_away(attempt: Any, when: str) -> None:
    """A keeper that is closed has its lines end, as if the runner died. Another attempt may have the directories."""
    left = directories(attempt)

    async def scenario() -> None:
        await (await attempt.start([attempt.rank(9, "true")], 5.0)).wait()
        rank = attempt.rank(0, "sleep", "0.3")
        launched = await Launched.start("t.1", [rank], 5.0, attempt.nursery, list(map(str, left)))
        pids = launched.keeper_pids
        if when == "after":
            await launched.wait()
            attempt.nursery.close()
        elif when == "during":
            attempt.nursery.close()
        else:
            attempt.nursery._process.kill()
        assert not (await launched.wait()).stuck
        await asyncio.to_thread(attempt.until, lambda: all(map(attempt.gone, pids)))

    asyncio.run(scenario())
    assert all((each / "file").exists() for each in left)


def test_without_a_word_of_leaving_it_is_the_runners_life_that_counts(
    attempt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "LEAVE", b"")
    test_a_living_runners_directories_are_its_own_whoever_it_sends_away(attempt, "after")


def test_keeper_killed_and_the_guard_cleans_up(attempt: Any) -> None:
    outcome, daemon = outcome_after(attempt, [0], signal.SIGKILL)
    assert attempt.gone(daemon)
    assert [end.error_kind for end in outcome.exits] == ["keeper_lost", "keeper_lost"]
    assert all(end.error and "signal 9" in end.error and "dmesg" in end.error for end in outcome.exits)
    assert outcome.first_failed is None
    assert outcome.leftovers_killed >= 1


def test_keeper_and_guard_killed_and_the_sweep_cleans_up(attempt: Any) -> None:
    outcome, daemon = outcome_after(attempt, [1, 0], signal.SIGKILL)
    assert attempt.gone(daemon)
    assert [end.error_kind for end in outcome.exits] == ["keeper_lost", "keeper_lost"]
    assert outcome.leftovers_killed >= 1


def test_guard_killed_changes_nothing(attempt: Any) -> None:
    async def scenario() -> LaunchOutcome:
        launched = await attempt.start([attempt.daemon(0, "time.sleep(1000)")], 60.0)
        await asyncio.to_thread(attempt.daemon_pid)
        os.kill(launched.keeper_pids[1], signal.SIGKILL)
        await asyncio.to_thread(attempt.until, lambda: attempt.gone(launched.keeper_pids[1]))
        assert len(attempt.alive()) == 2
        await launched.stop(0.1)
        await launched.wait()
        assert attempt.nursery._spare is None, "without its guard it takes no other attempt"
        return await launched.wait()

    outcome = asyncio.run(scenario())
    assert [end.signal_name for end in outcome.exits] == ["SIGKILL"], "it inherits SIGTERM ignored"
    assert outcome.leftovers_killed == 1


@pytest.mark.parametrize("victim", [0, 1], ids=["keeper", "guard"])
def test_sigterm_to_the_keeper_is_a_stop(attempt: Any, victim: int) -> None:
    outcome, _ = outcome_after(attempt, [victim], signal.SIGTERM)
    assert [end.signal_name for end in outcome.exits] == ["SIGKILL", "SIGTERM"]
    assert outcome.first_failed is None


def test_without_subreaper_the_sweep_finds_daemons(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where prctl fails: ranks run all the same, and what escapes to init is found by its mark."""
    crippled = attempt.folder / "keeper.py"
    crippled.write_text(nursery.KEEPER.read_text().replace("_prctl = _load_prctl()", "_prctl = None"))
    monkeypatch.setattr(nursery, "KEEPER", crippled)

    async def scenario() -> LaunchOutcome:
        launched = await attempt.start([attempt.daemon(0)], 60.0)
        return await launched.wait()

    outcome = asyncio.run(scenario())
    assert [end.code for end in outcome.exits] == [0]
    assert outcome.leftovers_killed == 1
    assert not attempt.alive()


def test_a_keeper_that_never_comes_up(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = attempt.folder / "keeper.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(nursery, "KEEPER", broken)

    async def scenario() -> LaunchOutcome:
        launched = await attempt.start([attempt.rank(0, "true")], 60.0)
        assert launched.keeper_pids == ()
        return await launched.wait()

    assert [end.error_kind for end in asyncio.run(scenario()).exits] == ["keeper_lost"]


# --- sweep -------------------------------------------------------------------------------------------------


def test_sweep_takes_all_of_one_key_and_nothing_else(attempt: Any) -> None:
    def start(key: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "1000"], env={"RM_ATTEMPT_KEY": key, "PATH": os.environ["PATH"]})

    longer = start(attempt.key + "7")
    other = start("x" + attempt.key)
    mine = [start(attempt.key) for _ in range(3)]
    try:
        assert sweep(attempt.key) == 3
        assert [each.wait(120) for each in mine] == [-signal.SIGKILL] * 3
        assert (longer.poll(), other.poll()) == (None, None)
        assert sweep(attempt.key) == 0
    finally:
        for each in (longer, other, *mine):
            each.kill()
            each.wait()


def test_sweep_spares_the_caller(attempt: Any) -> None:
    code = "import os, time\nfrom rm.runtime.processes import sweep\nif os.fork() == 0: time.sleep(1000)\n"
    code += f"print(sweep({attempt.key!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=attempt.env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


def test_sweep_of_an_empty_key_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        sweep("")


def test_a_reused_pid_is_not_signalled() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    try:
        found = keeper.read_process(child.pid)
        assert found is not None
        found.started -= 1  # as if the pid had belonged to an older process
        assert not keeper.signal_process(found, signal.SIGKILL)
        assert not keeper.signal_exactly(child.pid, signal.SIGKILL, lambda: False)
        assert child.poll() is None
        found.started += 1
        assert keeper.signal_process(found, signal.SIGKILL)
        assert child.wait(120) == -signal.SIGKILL
        assert not keeper.signal_process(found, signal.SIGKILL), "gone"
    finally:
        child.kill()
        child.wait()


def test_without_pidfds_signals_are_checked_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    child = subprocess.Popen(["sleep", "1000"])
    assert not keeper.signal_exactly(child.pid, signal.SIGKILL, lambda: False)
    assert keeper.signal_exactly(child.pid, signal.SIGKILL, lambda: True)
    assert child.wait(120) == -signal.SIGKILL


def test_names_with_brackets_do_not_confuse_the_reader_of_proc() -> None:
    assert keeper.Process(7, b"7 (a ) S (b) R 1 2 3 " + b"0 " * 15 + b"99 0").started == 99
    mine = keeper.read_process(os.getpid())
    assert mine is not None
    assert (mine.parent, mine.group, mine.alive) == (os.getppid(), os.getpgid(0), True)
    assert keeper.read_process(2**22 + 1) is None
