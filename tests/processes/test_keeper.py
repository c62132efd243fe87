"""The keeper's protocol, line by line: what `Launched` does not do, or not at such a moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from rm.runtime.nursery import KEEPER
from rm.runtime.processes import RankProcess


class Talk:
    """A conversation with a keeper."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(KEEPER), "t.1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        self.ready = self.read()

    def order(self, *ranks: RankProcess, grace_s: float = 60.0) -> dict[str, Any]:
        return {"attempt": "t.1", "grace_s": grace_s, "procs": [asdict(rank) for rank in ranks]}

    def say(self, *messages: dict[str, Any]) -> None:
        """All in one write."""
        self.input.write(b"".join(json.dumps(message).encode() + b"\n" for message in messages))
        self.input.flush()

    def read(self) -> dict[str, Any]:
        line = self.output.readline()
        return json.loads(line) if line else {}

    def rest(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output]


@pytest.fixture
def talk() -> Iterator[Talk]:
    mine = Talk()
    yield mine
    mine.process.communicate(timeout=20)
    assert mine.process.returncode == 0


def test_the_whole_story_of_one_rank(talk: Talk, attempt: Any) -> None:
    assert talk.ready["event"] == "ready"
    assert talk.ready["subreaper"] is True
    assert talk.ready["guard"] == talk.process.pid
    talk.say(talk.order(attempt.rank(4, "sh", "-c", "exit 3")))
    started, exited, done = talk.rest()
    assert started == {"event": "started", "rank": 4, "pid": started["pid"]}
    assert exited == {
        "event": "exited",
        "rank": 4,
        "code": 3,
        "signal": None,
        "at": exited["at"],
        "error": None,
    }
    assert done == {"event": "done", "first_failed": 4, "leftovers_killed": 0, "stuck": []}


def test_stop_in_the_same_breath_as_the_order(talk: Talk, attempt: Any) -> None:
    ranks = [attempt.rank(n, "sleep", "1000") for n in range(4)]
    talk.say(talk.order(*ranks), {"do": "stop", "grace_s": 60.0})
    events = talk.rest()
    assert sorted(each["rank"] for each in events if each["event"] == "exited") == [0, 1, 2, 3]
    assert all(each["signal"] == signal.SIGTERM for each in events if each["event"] == "exited")
    assert events[-1]["first_failed"] is None


def test_kill_in_the_same_breath_as_the_order(talk: Talk, attempt: Any) -> None:
    talk.say(talk.order(attempt.rank(0, "sleep", "1000")), {"do": "kill"})
    *_, exited, done = talk.rest()
    assert (exited["event"], exited["signal"]) == ("exited", signal.SIGKILL)
    assert done["first_failed"] is None


def test_stop_before_the_order_starts_nothing(talk: Talk, attempt: Any) -> None:
    talk.say({"do": "stop", "grace_s": 60.0})
    assert [each["event"] for each in talk.rest()] == ["done"]


def test_one_that_stays_takes_the_next_order_and_nothing_that_was_meant_for_the_last(
    talk: Talk, attempt: Any
) -> None:
    first = talk.order(attempt.rank(0, "sh", "-c", "exit 3")) | {"stay": True}
    late = [{"do": "stop", "grace_s": 0.0, "attempt": "t.1"}, {"do": "kill", "attempt": "t.1"}]
    talk.say(first)
    assert [talk.read()["event"] for _ in range(2)] == ["started", "exited"]
    done = talk.read()
    assert (done["event"], done["first_failed"], done["waits"]) == ("done", 0, True)
    second = talk.order(attempt.rank(1, "sleep", "0.2")) | {"stay": True, "attempt": "t.2"}
    talk.say(*late, second, *late)
    _, exited, done = (talk.read() for _ in range(3))
    assert (exited["rank"], exited["code"], done["first_failed"], done["waits"]) == (1, 0, None, True)
    talk.say(talk.order(attempt.rank(2, "sleep", "1000")) | {"attempt": "t.3", "stay": True})
    assert talk.read()["event"] == "started"
    os.kill(talk.ready["keeper"], signal.SIGTERM)
    exited, done = talk.rest()
    assert (exited["signal"], "waits" in done) == (signal.SIGTERM, False)


def test_one_that_waits_goes_with_its_runner(talk: Talk, attempt: Any) -> None:
    talk.say(talk.order(attempt.rank(0, "true")) | {"stay": True})
    assert [talk.read()["event"] for _ in range(3)] == ["started", "exited", "done"]
    talk.input.close()
    assert [each["event"] for each in talk.rest()] == ["done"]
    talk.process.stdin = None  # closed above


def test_an_order_may_arrive_in_pieces(talk: Talk, attempt: Any) -> None:
    text = json.dumps(talk.order(attempt.rank(0, "true"))).encode() + b"\n"
    for start in range(0, len(text), 1 + len(text) // 7):
        talk.input.write(text[start : start + 1 + len(text) // 7])
        talk.input.flush()
    assert [each["event"] for each in talk.rest()] == ["started", "exited", "done"]


def test_end_of_input_kills_at_once(talk: Talk, attempt: Any) -> None:
    talk.say(talk.order(attempt.daemon(0, "time.sleep(1000)")))
    attempt.daemon_pid()
    talk.input.close()
    *_, exited, done = talk.rest()
    assert (exited["signal"], done["leftovers_killed"]) == (signal.SIGKILL, 1)
    assert not attempt.alive()
    talk.process.stdin = None  # closed above


def test_end_of_output_kills_at_once(talk: Talk, attempt: Any) -> None:
    talk.say(talk.order(attempt.daemon(0, "time.sleep(1000)")))
    attempt.daemon_pid()
    talk.output.close()
    attempt.until(lambda: not attempt.alive())
    talk.process.stdout = None  # closed above


def test_gibberish_ends_the_keeper_and_the_guard_says_so(talk: Talk, attempt: Any) -> None:
    talk.say(talk.order(attempt.daemon(0, "time.sleep(1000)")))
    attempt.daemon_pid()
    talk.input.write(b"gibberish\n")
    talk.input.flush()
    lost = talk.rest()[-1]
    assert (lost["event"], lost["code"], lost["signal"]) == ("lost", 1, None)
    assert lost["leftovers_killed"] >= 1
    assert not attempt.alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_that_end_it_stop_the_ranks(talk: Talk, attempt: Any, number: int) -> None:
    talk.say(talk.order(attempt.rank(0, "sleep", "1000"), grace_s=60.0))
    assert talk.read()["event"] == "started"
    os.kill(talk.ready["keeper"], number)
    exited, done = talk.rest()
    assert (exited["signal"], done["first_failed"]) == (signal.SIGTERM, None)


def test_it_stands_apart_from_the_runner(talk: Talk) -> None:
    keeper, guard = talk.ready["keeper"], talk.ready["guard"]
    assert len({os.getsid(pid) for pid in (0, keeper, guard)}) == 3
    talk.say({"do": "kill"})
    assert [each["event"] for each in talk.rest()] == ["done"]


def test_closed_standard_streams_of_the_runner_do_no_harm(attempt: Any) -> None:
    """A runner without stderr must not make a log file the keeper's stderr."""
    order = json.dumps({"attempt": "t.1", "grace_s": 1, "procs": [asdict(attempt.rank(0, "echo", "fine"))]})
    command = f"{sys.executable} -I -S {KEEPER} t.1 2>&-"
    with subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.stdin.write(order.encode() + b"\n")
        shell.stdin.flush()
        assert [json.loads(line)["event"] for line in shell.stdout][-1] == "done"
    assert attempt.out(0) == "fine\n"
