"""Starting, ending and stopping ranks, with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rm.runtime.processes import Launched, LaunchOutcome, RankProcess
from rm.runtime.tail import Tail

IGNORE_TERM = "import signal, time; signal.signal(15, signal.SIG_IGN); open('ready', 'w'); time.sleep(1000)"


def run(attempt: Any, *procs: RankProcess, grace_s: float = 5.0) -> LaunchOutcome:
    """Start these ranks and let them end by themselves."""

    async def scenario() -> LaunchOutcome:
        return await (await attempt.start(procs, grace_s)).wait()

    return asyncio.run(scenario())


# --- how a rank ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 3, 127, 255])
def test_exit_code_is_passed_on(attempt: Any, code: int) -> None:
    outcome = run(attempt, attempt.rank(0, "sh", "-c", f"exit {code}"))
    (end,) = outcome.exits
    assert (end.code, end.signal, end.error, end.failed) == (code, None, None, code != 0)
    assert outcome.first_failed == (0 if code else None)
    assert outcome.leftovers_killed == 0
    assert abs(end.at - time.time()) < 60


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT", "SIGTERM"])
def test_death_by_signal_has_its_name(attempt: Any, name: str) -> None:
    outcome = run(attempt, attempt.rank(0, "sh", "-c", f"ulimit -c 0; kill -{name[3:]} $$"))
    (end,) = outcome.exits
    assert (end.code, end.signal, end.signal_name) == (None, getattr(signal, name), name)
    assert outcome.first_failed == 0


def test_real_time_signals_have_numbers_only(attempt: Any) -> None:
    (end,) = run(attempt, attempt.python(0, "import os; os.kill(os.getpid(), 40)")).exits
    assert (end.signal, end.signal_name) == (40, "signal 40")


def test_a_rank_starts_clean(attempt: Any) -> None:
    """Own session, no stray file, empty stdin, default signals: whatever the runner has set for itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        code = """import os
print(os.getsid(0) == os.getpid(), os.readlink("/proc/self/fd/0"))
print(len(os.listdir("/proc/self/fd")))  # 0, 1, 2 and the listing itself
print([int(line.split()[1], 16) for line in open("/proc/self/status") if line.startswith("SigBlk")])
print(os.environ["RM_ATTEMPT_KEY"], os.getcwd())"""
        outcome = run(
            attempt, attempt.python(0, code), attempt.rank(1, "grep", "^Sig[BI]", "/proc/self/status")
        )
    finally:
        signal.signal(signal.SIGUSR2, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert [end.code for end in outcome.exits] == [0, 0]
    assert attempt.out(0).splitlines() == [
        "True /dev/null",
        "4",
        "[0]",
        f"{attempt.key} {attempt.folder}",
    ]
    # 32 and 33 belong to the C library, which lets nobody set them: `make` leaves them ignored in what it starts.
    its_own = 1 << 31 | 1 << 32
    assert [int(line.split()[1], 16) & ~its_own for line in attempt.out(1).splitlines()] == [0, 0]


def test_output_of_100_mb_arrives_whole(attempt: Any) -> None:
    size = 100 * 2**20
    outcome = run(attempt, attempt.rank(0, "sh", "-c", f"head -c {size} /dev/zero; echo done >&2"))
    assert outcome.exits[0].code == 0
    tail, read = Tail(attempt.folder / "0.out"), 0
    while not tail.drained:
        read += len(tail.read(8 * 2**20))
    assert read == size
    assert (attempt.folder / "0.err").read_text() == "done\n"


def test_one_file_can_take_both_streams_and_is_appended_to(attempt: Any) -> None:
    both = attempt.folder / "both.log"
    both.write_text("first\n")
    run(
        attempt,
        attempt.rank(0, "sh", "-c", "echo out; echo err >&2; echo out", stdout=str(both), stderr=str(both)),
        attempt.rank(1, "sh", "-c", "exit 0", stdout=str(both), stderr=str(both)),
    )
    assert both.read_text() == "first\nout\nerr\nout\n"


def test_a_rank_may_close_its_output(attempt: Any) -> None:
    outcome = run(
        attempt, attempt.python(0, "import os, sys, time; [os.close(n) for n in range(3)]; time.sleep(.1)")
    )
    assert [(end.code, end.signal) for end in outcome.exits] == [(0, None)]


# --- ranks that never start --------------------------------------------------------------------------------


def a_file(folder: Path, text: str, mode: int) -> str:
    path = folder / "script"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("argv", "changes", "kind", "words"),
    [
        (["no-such-command"], {}, "command_not_found", ["'no-such-command'", "PATH", "runtime_env"]),
        (["./nothing.py"], {}, "command_not_found", ["'./nothing.py'", "working_dir"]),
        (["true"], {"cwd": "/no/such/folder"}, "bad_cwd", ["'/no/such/folder'", "working_dir"]),
        (["true"], {"stdout": "/no/such/log"}, "bad_output", ["'/no/such/log'"]),
        (["{script}"], {"text": "#!/bin/sh\n", "mode": 0o644}, "permission", ["chmod +x"]),
        (["{script}"], {"text": "#!/no/sh\n", "mode": 0o755}, "bad_interpreter", ["'#!'"]),
        (["{script}"], {"text": "x = 1\n", "mode": 0o755}, "bad_format", ["python"]),
        (["true", "a\0b"], {}, "not_started", ["NUL"]),
        (["true", "a" * 3_000_000], {}, "too_large", ["file"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_start_says_what_to_fix(
    attempt: Any, argv: list[str], changes: dict[str, Any], kind: str, words: list[str]
) -> None:
    changes = dict(changes)
    script = a_file(attempt.folder, changes.pop("text", ""), changes.pop("mode", 0o644))
    outcome = run(attempt, attempt.rank(3, *[each.format(script=script) for each in argv], **changes))
    (end,) = outcome.exits
    assert (end.code, end.signal, end.error_kind) == (None, None, kind)
    assert end.error is not None
    assert end.error.startswith("rank 3: ")
    assert all(word in end.error for word in words), end.error
    assert outcome.first_failed == 3


def test_the_checkpoint_directory_is_there_before_user_code(attempt: Any) -> None:
    there = attempt.folder / "root" / "abc" / "j1"
    look = attempt.rank(0, "test", "-d", str(there), checkpoint_dir=str(there))
    assert run(attempt, look, attempt.rank(1, "true", checkpoint_dir=str(there))).first_failed is None
    assert run(attempt, look).first_failed is None, "it may be there already"


def test_the_root_of_checkpoints_may_be_a_link_and_a_jobs_directory_may_not(attempt: Any) -> None:
    (attempt.folder / "disk").mkdir()
    root = attempt.folder / "root"
    root.symlink_to(attempt.folder / "disk")
    assert run(attempt, attempt.rank(0, "true", checkpoint_dir=str(root / "j1"))).first_failed is None
    assert (attempt.folder / "disk" / "j1").is_dir()
    (root / "j2").symlink_to(attempt.folder)
    (end,) = run(attempt, attempt.rank(0, "touch", "ran", checkpoint_dir=str(root / "j2"))).exits
    assert end.error_kind == "bad_checkpoint_dir"
    assert end.error is not None
    assert "is a link" in end.error
    assert not (attempt.folder / "ran").exists()


def test_a_checkpoint_directory_that_cannot_be_made_says_what_to_fix(attempt: Any) -> None:
    (attempt.folder / "file").touch()
    (end,) = run(attempt, attempt.rank(0, "true", checkpoint_dir=str(attempt.folder / "file" / "j1"))).exits
    assert end.error_kind == "bad_checkpoint_dir"
    assert end.error is not None
    assert "Not a directory" in end.error
    assert "RM_CHECKPOINT_ROOT" in end.error


def test_a_rank_that_cannot_start_takes_its_gang_along(attempt: Any) -> None:
    outcome = run(attempt, attempt.rank(0, "sleep", "1000"), attempt.rank(1, "no-such-command"))
    assert outcome.first_failed == 1
    assert [end.signal_name for end in outcome.exits] == ["SIGTERM", None]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"env": {}}, "RM_ATTEMPT_KEY"),
        ({"cwd": "here"}, "cwd"),
        ({"argv": ()}, "argv"),
        ({"rank": 1}, "twice"),
    ],
)
def test_a_broken_order_names_the_field(attempt: Any, change: dict[str, Any], field: str) -> None:
    good = attempt.rank(0, "true")
    fields = {name: getattr(good, name) for name in RankProcess.__dataclass_fields__}
    with pytest.raises(ValueError, match=field):
        run(attempt, RankProcess(**(fields | change)), attempt.rank(1, "true"))


def test_an_empty_order_is_refused(attempt: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        run(attempt)


# --- gangs -------------------------------------------------------------------------------------------------


def test_one_of_eight_fails_and_the_others_are_stopped(attempt: Any) -> None:
    ranks = [attempt.rank(n, "sleep", "1000") for n in range(8)]
    ranks[5] = attempt.rank(5, "sh", "-c", "exit 7")
    outcome = run(attempt, *ranks)
    assert outcome.first_failed == 5
    assert [end.rank for end in outcome.exits] == list(range(8))
    assert [end.code for end in outcome.exits if end.failed and end.code is not None] == [7]
    assert [end.signal for end in outcome.exits] == [None if n == 5 else 15 for n in range(8)]


def test_a_gang_that_ignores_sigterm_gets_the_grace_of_the_order(attempt: Any) -> None:
    wait = "while [ ! -e ready ]; do sleep 0.01; done; exit 2"
    outcome = run(attempt, attempt.python(0, IGNORE_TERM), attempt.rank(1, "sh", "-c", wait), grace_s=0.3)
    assert outcome.first_failed == 1
    assert [end.signal_name for end in outcome.exits] == ["SIGKILL", None]
    assert 0.29 <= outcome.exits[0].at - outcome.exits[1].at < 30


def test_a_rank_that_ends_well_leaves_the_others_running(attempt: Any) -> None:
    slow = attempt.rank(1, "sh", "-c", "while [ ! -e go ]; do sleep 0.01; done")

    async def scenario() -> LaunchOutcome:
        launched = await attempt.start([attempt.rank(0, "true"), slow], 5.0)
        await asyncio.to_thread(attempt.until, lambda: attempt.gone(launched.pids[0]))
        (attempt.folder / "go").touch()
        return await launched.wait()

    assert [(end.code, end.signal) for end in asyncio.run(scenario()).exits] == [(0, None), (0, None)]


def test_many_end_at_once(attempt: Any) -> None:
    outcome = run(attempt, *[attempt.rank(n, "true") for n in range(32)])
    assert [(end.rank, end.code) for end in outcome.exits] == [(n, 0) for n in range(32)]
    assert outcome.first_failed is None


# --- stopping ----------------------------------------------------------------------------------------------


def stop(
    attempt: Any, rank: RankProcess, *graces_s: float, ready: str = "ready"
) -> tuple[LaunchOutcome, float]:
    """Start the rank, wait for its file `ready`, stop it with each grace; the outcome, and the seconds."""

    async def scenario() -> tuple[LaunchOutcome, float]:
        launched = await attempt.start([rank], 60.0)
        await asyncio.to_thread(attempt.until, attempt.saw(ready))
        began = time.monotonic()
        for grace_s in graces_s:
            await launched.stop(grace_s)
        outcome = await launched.wait()
        took_s = time.monotonic() - began
        await launched.stop(0.0)  # after the end: nothing
        launched.kill()
        assert await launched.wait() == outcome
        return outcome, took_s

    return asyncio.run(scenario())


def test_stop_is_sigterm(attempt: Any) -> None:
    outcome, took_s = stop(attempt, attempt.rank(0, "sh", "-c", "touch ready; exec sleep 1000"), 60.0)
    assert [end.signal_name for end in outcome.exits] == ["SIGTERM"]
    assert outcome.first_failed is None, "it did not fail by itself"
    assert took_s < 30


def test_stop_lets_user_code_save_and_choose_its_code(attempt: Any) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(9)); open('ready', 'w')\n"
    code += "while True: time.sleep(.1)"
    outcome, _ = stop(attempt, attempt.python(0, code), 60.0)
    assert [(end.code, end.signal) for end in outcome.exits] == [(9, None)]
    assert outcome.first_failed is None


def test_sigterm_ignored_is_sigkill_after_the_grace(attempt: Any) -> None:
    outcome, took_s = stop(attempt, attempt.python(0, IGNORE_TERM), 0.3)
    assert [end.signal_name for end in outcome.exits] == ["SIGKILL"]
    assert 0.29 <= took_s < 30


def test_stop_again_signals_once_and_shortens_the_grace(attempt: Any) -> None:
    code = "import signal, time; signal.signal(15, lambda *_: print('T', flush=True)); open('ready', 'w')\n"
    outcome, took_s = stop(attempt, attempt.python(0, code + "while True: time.sleep(.1)"), 60.0, 0.3, 60.0)
    assert [end.signal_name for end in outcome.exits] == ["SIGKILL"]
    assert attempt.out(0) == "T\n"
    assert took_s < 30


def test_the_grace_is_the_whole_group_s_when_sigterm_kills_its_shell(attempt: Any) -> None:
    (attempt.folder / "train.py").write_text(
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(.3)\n    open('saved', 'w')\n    sys.exit(0)\n"
        "signal.signal(15, save)\nopen('ready', 'w')\nwhile True: time.sleep(.1)\n"
    )
    outcome, took_s = stop(
        attempt, attempt.rank(0, "sh", "-c", f"{sys.executable} -I -S train.py; true"), 60.0
    )
    assert [end.signal_name for end in outcome.exits] == ["SIGTERM"]
    assert attempt.saw("saved")(), "the shell died at once; what it had started kept its grace"
    assert outcome.leftovers_killed == 0
    assert took_s < 30


def test_a_leader_that_shuts_down_by_itself_leaves_no_grace_to_what_it_forgot(attempt: Any) -> None:
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(15, signal.SIG_IGN)\n"
        "if os.fork() == 0: time.sleep(1000)\n"
        "signal.signal(15, lambda *_: sys.exit(0)); open('ready', 'w')\nwhile True: time.sleep(.1)\n"
    )
    outcome, took_s = stop(attempt, attempt.python(0, code), 60.0)
    assert [(end.code, end.signal) for end in outcome.exits] == [(0, None)]
    assert outcome.leftovers_killed == 1
    assert took_s < 30


def test_kill_is_at_once(attempt: Any) -> None:
    async def scenario() -> LaunchOutcome:
        launched = await attempt.start([attempt.python(0, IGNORE_TERM), attempt.rank(1, "sleep", "99")], 60)
        await asyncio.to_thread(attempt.until, attempt.saw("ready"))
        launched.kill()
        launched.kill()
        return await launched.wait()

    outcome = asyncio.run(scenario())
    assert [end.signal_name for end in outcome.exits] == ["SIGKILL", "SIGKILL"]
    assert outcome.first_failed is None


def test_stop_may_meet_the_end(attempt: Any) -> None:
    """Whichever comes first, there is one exit, and nothing is called a failure that was a stop."""

    async def scenario() -> None:
        for round_ in range(6):
            launched = await attempt.start([attempt.rank(0, "sh", "-c", "exit 0")], 5.0)
            await asyncio.sleep(0.001 * round_)
            await launched.stop(5.0)
            outcome = await launched.wait()
            assert [(end.code, end.signal) for end in outcome.exits] in ([(0, None)], [(None, 15)])
            assert outcome.first_failed is None

    asyncio.run(scenario())


# --- the caller's side of asyncio --------------------------------------------------------------------------


def test_the_loop_may_run_in_another_thread(attempt: Any) -> None:
    """As that of an asyncio actor does."""
    outcomes: list[LaunchOutcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run(attempt, attempt.daemon(0))))
    thread.start()
    thread.join(60)
    assert [end.code for end in outcomes[0].exits] == [0]
    assert outcomes[0].leftovers_killed == 1


def test_wait_may_be_cancelled_and_repeated(attempt: Any) -> None:
    async def scenario() -> None:
        launched = await attempt.start([attempt.rank(0, "sleep", "1000")], 5.0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(launched.wait(), 0.01)
        assert not attempt.gone(launched.pids[0]), "a caller who stops waiting stops nothing"
        await launched.stop(5.0)
        first, second = await asyncio.gather(launched.wait(), launched.wait())
        assert first is second

    asyncio.run(scenario())


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01, 0.02, 0.03])
def test_a_cancelled_start_leaves_nothing(attempt: Any, after_s: float) -> None:
    async def scenario() -> None:
        starting = asyncio.create_task(attempt.start([attempt.rank(0, "sleep", "1000")], 60.0))
        await asyncio.sleep(after_s)
        starting.cancel()
        try:
            (await starting).kill()
        except asyncio.CancelledError:
            pass
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            await task
        await asyncio.to_thread(attempt.until, lambda: not attempt.alive())

    asyncio.run(scenario())


# --- a keeper that was prepared ----------------------------------------------------------------------------


def test_a_prepared_keeper_has_one_attempt_at_a_time(attempt: Any) -> None:
    async def scenario() -> None:
        nursery = attempt.nursery
        nursery.prepare()
        await nursery._preparing
        spare = nursery._spare
        first = await attempt.start([attempt.rank(0, "sh", "-c", "echo one; sleep 0.5; exit 3")], 5.0)
        assert first._talk is spare
        second = await attempt.start([attempt.rank(1, "echo", "two")], 5.0)
        assert second._talk is not spare
        assert [(await each.wait()).exits[0].code for each in (first, second)] == [3, 0]
        assert first.keeper_pids != second.keeper_pids
        await until_async(lambda: attempt.gone(second.keeper_pids[0]) or attempt.gone(first.keeper_pids[0]))

    asyncio.run(scenario())
    assert (attempt.out(0), attempt.out(1)) == ("one\n", "two\n")


def test_a_keeper_stays_for_the_next_attempt_and_each_starts_clean(attempt: Any) -> None:
    """Whatever ended the one before: a failure, a stop with a daemon left, a kill, a command that is not there."""

    async def scenario() -> None:
        nursery, pids = attempt.nursery, []
        for number, (argv, end) in enumerate(
            [
                (("sh", "-c", "exit 3"), None),
                (("sh", "-c", "(setsid sleep 1000 &) ; sleep 1000"), "stop"),
                (("sleep", "1000"), "kill"),
                (("not-there",), None),
                (("sh", "-c", "exit 0"), None),
            ]
        ):
            launched = await Launched.start(f"t.{number}", [attempt.rank(number, *argv)], 5.0, nursery)
            pids.append(launched.keeper_pids)
            if end == "stop":
                await launched.stop(5.0)
            elif end == "kill":
                launched.kill()
            outcome = await launched.wait()
            assert not attempt.alive()
            assert outcome.stuck == ()
            await launched.stop(0.0)  # too late, and meant for nobody else
            if number == 4:
                assert (outcome.exits[0].code, outcome.first_failed, outcome.leftovers_killed) == (0, None, 0)
        assert len(set(pids)) == 1

    async def all_of_it() -> None:
        await (await attempt.start([attempt.rank(9, "true")], 5.0)).wait()
        await scenario()

    asyncio.run(all_of_it())


def test_a_prepared_keeper_that_was_killed_is_not_used(attempt: Any) -> None:
    async def scenario() -> None:
        nursery = attempt.nursery
        nursery.prepare()
        await nursery._preparing
        ready = json.loads(nursery._spare._first)
        for pid in (ready["guard"], ready["keeper"]):
            os.kill(pid, signal.SIGKILL)
        await until_async(lambda: not nursery._spare.waits)
        launched = await attempt.start([attempt.rank(0, "true")], 5.0)
        assert (await launched.wait()).exits[0].code == 0

    asyncio.run(scenario())


def test_a_prepared_keeper_goes_with_its_nursery(attempt: Any) -> None:
    async def scenario() -> None:
        attempt.nursery.prepare()
        await attempt.nursery._preparing
        ready = json.loads(attempt.nursery._spare._first)
        attempt.nursery.close()
        await asyncio.to_thread(
            attempt.until, lambda: attempt.gone(ready["guard"]) and attempt.gone(ready["keeper"])
        )

    asyncio.run(scenario())


def test_a_nursery_that_was_closed_is_not_started_again_for_an_attempt_that_may_never_come(
    attempt: Any,
) -> None:
    """An interpreter with preloaded modules, say, whose time was over while its function ran."""

    async def scenario() -> None:
        launched = await attempt.start([attempt.rank(0, "sleep", "0.2")], 5.0)
        attempt.nursery.close()
        assert (await launched.wait()).exits[0].code == 0
        attempt.nursery.prepare()
        await attempt.nursery._preparing
        assert not attempt.nursery.alive
        launched = await attempt.start([attempt.rank(1, "true")], 5.0)
        assert (await launched.wait()).exits[0].code == 0
        assert attempt.nursery.alive

    asyncio.run(scenario())


async def until_async(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
