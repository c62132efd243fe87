"""The rules of `rm.ledger.history`: what the core does is possible, and each impossible thing is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_batches import PLACED, Recorder, make_job, told_story

from rm.core.events import (
    AvailabilityChecked,
    Event,
    HoldChanged,
    JobAdmitted,
    JobSubmitted,
    PlacementReady,
    PlacementReleased,
    ReserveFailed,
    RunExited,
    RunLost,
    RunStarted,
    StopRequested,
)
from rm.core.model import Job, Kind, Outcome, Status, StopCause
from rm.core.policy import Policy, Preempt, QueuePolicy
from rm.ledger.history import History
from rm.testing import Behaviour

Found = list[tuple[str, str, int]]


def judged(events: list[Event], *records: Job) -> tuple[Found, list[str]]:
    """What, job and number of each finding, and the words."""
    found: Found = []
    words: list[str] = []

    def report(what: str, job_id: str, seq: int, message: str) -> None:
        found.append((what, job_id, seq))
        words.append(message)

    history = History(report)
    for seq, event in enumerate(events, 1):
        history.add(seq, event)
    for job in records:
        history.compare(job)
    return found, words


# --- what the core does ------------------------------------------------------------------------------------

POLICY = Policy({"default": QueuePolicy("default", preempt=Preempt.LOWER)}, default_queue="default")
ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.sampled_from([0.5, 1, 1, 2, 4]),
            st.integers(1, 2),
            st.lists(st.sampled_from(["ok", "fail", "lost", "unready"]), max_size=3),
            st.sampled_from([Kind.COMMAND, Kind.COMMAND, Kind.LEASE]),
            st.sampled_from([None, 1.0, 30.0]),
            st.integers(0, 3).map(lambda level: 100 * level),
            st.integers(0, 2),
            st.sampled_from([False, False, "after"]),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("hold"), st.integers(0, 20), st.booleans()),
        st.tuples(st.just("step"), st.integers(1, 10)),
        st.tuples(st.just("lose"), st.integers(0, 3)),
        st.tuples(st.just("join"), st.integers(1, 4)),
    ),
    min_size=5,
    max_size=40,
)  # fmt: skip


def play(fake: Recorder, actions: list[tuple]) -> None:
    for kind, *rest in actions:
        live = list(fake.state.jobs)
        nodes = sorted(fake.state.nodes)
        if kind == "submit":
            gpus, count, fates, job_kind, limit, priority, retries, after = rest
            fake.submit(
                gpus,
                count=count,
                behaviour=Behaviour(7.0, (*fates, "ok")),
                kind=job_kind,
                time_limit_s=limit,
                priority=priority,
                max_retries=retries,
                max_infra_retries=retries,
                after=tuple(live[-1:]) if after else (),
            )
        elif kind == "cancel" and live:
            fake.cancel(live[rest[0] % len(live)])
        elif kind == "hold" and live:
            fake.happen(HoldChanged(fake.now, live[rest[0] % len(live)], rest[1], "someone"))
        elif kind == "lose" and nodes:
            fake.lose_node(nodes[rest[0] % len(nodes)])
        elif kind == "join":
            fake.add_node(f"n{len(fake.rows)}", rest[0])
        elif kind == "step":
            for _ in range(rest[0]):
                fake.step()


@settings(deadline=None, max_examples=150)
@given(ACTIONS)
def test_whatever_the_core_does_is_a_legal_story_at_every_moment(actions: list[tuple]) -> None:
    fake = Recorder(POLICY)
    fake.add_node("n", 4)
    for action in actions:
        play(fake, [action])
        assert judged([row.event for row in fake.rows], *fake.records()) == ([], [])


def test_the_stories_include_evictions_losses_and_chains() -> None:
    """Else the test above would show little."""
    fake = Recorder(POLICY)
    fake.add_node("n", 2)
    fake.submit(2, priority=100, behaviour=Behaviour(50))
    fake.run(lambda: fake.state.jobs["j1"].status is Status.RUNNING)
    fake.submit(2, priority=200, behaviour=Behaviour(5))
    fake.run(lambda: len(fake.ended) == 2)
    assert fake.ended["j1"].evictions == 1
    assert judged([row.event for row in fake.rows], *fake.records()) == ([], [])
    story = told_story()
    assert judged([row.event for row in story.rows], *story.records()) == ([], [])
    assert [str(job.status) for job in story.records()][2:5] == ["CANCELLED", "CANCELLED", "FAILED"]


# --- what can't be -----------------------------------------------------------------------------------------

JOB = make_job(1)
SUBMITTED = JobSubmitted(1.0, JOB)
ADMITTED = JobAdmitted(2.0, "j1", 1, PLACED)
READY = PlacementReady(3.0, "j1", 1)
STARTED = RunStarted(4.0, "j1", 1)
EXITED = RunExited(5.0, "j1", 1, Outcome(Status.SUCCEEDED))
RELEASED = PlacementReleased(6.0, "j1", 1)
WHOLE: list[Event] = [SUBMITTED, ADMITTED, READY, STARTED, EXITED, RELEASED]
AGAIN: list[Event] = [SUBMITTED, ADMITTED, READY, STARTED, RunLost(5.0, "j1", 1, "gone"), RELEASED]
SECOND = JobAdmitted(7.0, "j1", 2, PLACED)


def without(event: Event) -> list[Event]:
    return [each for each in WHOLE if each is not event]


@pytest.mark.parametrize(
    "events, expected, words",
    [
        (without(SUBMITTED), ("history", "j1", 1), "comes before the job was submitted"),
        ([SUBMITTED, SUBMITTED], ("history", "j1", 2), "comes again, after event 1"),
        (without(ADMITTED), ("history", "j1", 2), "PlacementReady of attempt 1 comes while it is queued"),
        (without(READY), ("history", "j1", 3), "RunStarted of attempt 1 comes while attempt 1 is RESERVING"),
        (without(EXITED), ("history", "j1", 5), "PlacementReleased of attempt 1 comes while attempt 1 is RUNNING"),
        ([SUBMITTED, ADMITTED, READY, ReserveFailed(4.0, "j1", 1, "no")], ("history", "j1", 4), "is STARTING"),
        ([*WHOLE[:4], STARTED], ("history", "j1", 5), "RunStarted of attempt 1 comes while attempt 1 is RUNNING"),
        ([*WHOLE[:5], EXITED], ("history", "j1", 6), "RunExited of attempt 1 comes while attempt 1 is RELEASING"),
        ([*WHOLE[:2], AvailabilityChecked(3.0, "j1", None)], ("history", "j1", 3), "while attempt 1 is RESERVING"),
        ([SUBMITTED, replace(ADMITTED, attempt=2)], ("history", "j1", 2), "attempt 2 was admitted after attempt 0"),
        ([SUBMITTED, ADMITTED, SECOND], ("overlap", "j1", 3), "while attempt 1 is RESERVING: its GPUs were not back"),
        ([*AGAIN[:5], SECOND], ("overlap", "j1", 6), "admitted while attempt 1 is RELEASING"),
        ([*WHOLE[:3], replace(STARTED, attempt=2)], ("overlap", "j1", 4), "RunStarted of attempt 2 comes while"),
        ([*AGAIN, SECOND, replace(READY, attempt=1)], ("history", "j1", 8), "PlacementReady of attempt 1 comes while"),
        ([*WHOLE, HoldChanged(7.0, "j1", True)], ("after_end", "j1", 7), "ended SUCCEEDED (event 6)"),
        ([*WHOLE, SECOND], ("after_end", "j1", 7), "JobAdmitted of attempt 2 comes after it had ended"),
        (
            [SUBMITTED, StopRequested(2.0, "j1", StopCause.PREEMPTED)],
            ("history", "j1", 2),
            "StopRequested (preempted) changes nothing",
        ),
        (
            [SUBMITTED, ADMITTED, *[StopRequested(3.0, "j1", StopCause.CANCELLED)] * 2],
            ("history", "j1", 4),
            "StopRequested (cancelled) changes nothing",
        ),
        (
            [JobSubmitted(1.0, replace(JOB, after=("j7",))), ADMITTED],
            ("history", "j1", 2),
            "comes while it waits for j7",
        ),
    ],
)  # fmt: skip
def test_what_can_not_be_is_told_once(
    events: list[Event], expected: tuple[str, str, int], words: str
) -> None:
    found, told = judged(events)
    assert found == [expected]
    assert words in told[0]


def test_a_record_without_events_and_events_without_a_record() -> None:
    assert judged([], JOB)[0] == [("history", "j1", 0)]
    assert judged([SUBMITTED])[0] == [], "who has no record is found by `check`, which sees all rows"


ENDED = replace(JOB, status=Status.SUCCEEDED, attempts=1, ended_at=6.0)


@pytest.mark.parametrize(
    "record, words",
    [
        (replace(ENDED, status=Status.FAILED), "status FAILED, not SUCCEEDED"),
        (
            replace(ENDED, status=Status.QUEUED, ended_at=None),
            "status QUEUED, not SUCCEEDED; ended False, not True",
        ),
        (replace(ENDED, attempts=2), "attempts 2, not 1"),
        (replace(ENDED, failures=1), "failures 1, not 0"),
        (replace(ENDED, infra_failures=1), "infra_failures 1, not 0"),
        (replace(ENDED, evictions=1), "evictions 1, not 0"),
    ],
)
def test_a_record_that_disagrees_with_its_events(record: Job, words: str) -> None:
    assert judged(WHOLE, ENDED) == ([], [])
    found, told = judged(WHOLE, record)
    assert found == [("status", "j1", 6)]
    assert told[0].endswith(words)


def test_an_attempt_that_the_events_do_not_know() -> None:
    story = told_story()
    running = story.state.jobs["j6"]
    assert running.attempt is not None
    events = [row.event for row in story.rows]
    found, told = judged(events, replace(running, attempt=replace(running.attempt, number=2)))
    assert (found[0][0], told) == ("status", ["the record disagrees with the events: attempt 2, not 1"])


def test_what_follows_an_unreadable_event_is_not_judged() -> None:
    found: Found = []
    history = History(lambda what, job_id, seq, _words: found.append((what, job_id, seq)))
    history.add(1, SUBMITTED)
    history.unreadable(2, "j1")
    for seq, event in enumerate(WHOLE[2:], 3):
        history.add(seq, event)
    history.compare(JOB)
    assert found == []
