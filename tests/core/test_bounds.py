"""A cycle does not do without end. Whom it could not come to is told which bound it was."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rm.core import cycle, searches
from rm.core.events import AvailabilityChecked, JobAdmitted, JobSubmitted, StopRequested
from rm.core.model import GPU_TYPE, Gang, Job, Kind
from rm.core.policy import Policy, Preempt, QueuePolicy
from rm.core.reasons import NOT_EVALUATED, RESERVED, Reason
from rm.core.records import replace
from rm.core.resources import GPU_UNIT, Bundle
from rm.testing import Behaviour, FakeCluster


def waiting(name: str, seq: int, gpus: int, limit_s: float | None, *gpu_types: str) -> Job:
    gang = Gang(Bundle(gpus * GPU_UNIT), gpu_types=gpu_types)
    return Job(name, seq, name, "ann", Kind.COMMAND, gang, 1.0, time_limit_s=limit_s, grace_s=0.0)


def looked_at(*jobs: Job) -> tuple[list[str], dict[str, Reason | None]]:
    """Who starts, and what the others are told, where these jobs come to 3 of 5 GPUs in use until T = 100."""
    fake = FakeCluster(now=0.0)
    fake.add_node("n", 5)
    fake.submit(3, time_limit_s=95.0, grace_s=0.0, behaviour=Behaviour(1000.0))
    fake.now = 1.0
    for job in jobs:
        fake.state.apply(JobSubmitted(fake.now, job))
    events = cycle.schedule(fake.state, fake.now).events
    started = [event.job_id for event in events if isinstance(event, JobAdmitted)]
    return started, {event.job_id: event.reason for event in events if isinstance(event, AvailabilityChecked)}


def test_reasons_are_written_down_some_in_each_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycle, "CHECKS", 2)
    fake = FakeCluster(now=0.0)
    fake.add_node("n", 1)
    for number in range(1, 7):
        fake.state.apply(JobSubmitted(0.0, waiting(f"j{number}", number, 1, None)))
    seen = []
    for turn in range(4):
        events = cycle.schedule(fake.state, fake.now + turn).events
        seen.append([each.job_id for each in events if isinstance(each, AvailabilityChecked) and each.reason])
        assert (fake.state.wake_at is not None) == (turn < 2), "it goes on by itself"
        for event in events:
            fake.state.apply(event)
    assert seen == [["j2", "j3"], ["j4", "j5"], ["j6"], []], "who starts does not wait for it"


def test_who_would_end_in_time_but_was_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [
        waiting("head", 2, 5, None), waiting("long", 3, 1, 500.0), waiting("soon", 4, 1, 20.0),
        waiting("later", 5, 1, 600.0),
    ]  # fmt: skip
    started, _ = looked_at(*jobs)
    assert started == ["soon"]
    monkeypatch.setattr(cycle, "BACKFILL_DEPTH", 1)
    started, reasons = looked_at(*jobs)
    assert started == []
    told = {job_id: reason.code for job_id, reason in reasons.items() if reason is not None}
    assert told == {"head": "WaitingForCapacity", "long": RESERVED, "soon": NOT_EVALUATED, "later": RESERVED}
    assert reasons["soon"] is not None
    assert reasons["soon"].evidence == {"bound": "backfill_depth"}


def test_who_fits_when_the_walks_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [waiting("head", 2, 5, None), waiting("soon", 3, 1, 20.0), waiting("endless", 4, 1, None)]
    started, reasons = looked_at(*jobs)
    assert started == ["soon"]
    assert reasons["endless"] is not None
    assert reasons["endless"].code == RESERVED
    monkeypatch.setattr(cycle, "MOST_PASSES", 1)
    started, reasons = looked_at(*jobs)
    assert started == ["soon"]
    assert reasons["endless"] is not None
    assert (reasons["endless"].code, reasons["endless"].evidence) == (NOT_EVALUATED, {"bound": "passes"})


def test_who_has_a_right_to_victims_that_were_not_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches that failed are not repeated, so that the next cycle comes to those behind them."""
    monkeypatch.setattr(searches, "LOOKS", searches.SEARCH)
    fake = FakeCluster(policy=Policy(queues={"default": QueuePolicy("default", preempt=Preempt.LOWER)}))
    fake.add_node("n", 4, **{GPU_TYPE: "A100"})
    fake.add_node("h", 2, **{GPU_TYPE: "H100"})
    fake.submit(2, preemptible=False, priority=-100, gpu_types=("A100",), behaviour=Behaviour(1000.0))
    fake.submit(2, priority=-100, gpu_types=("H100",), behaviour=Behaviour(1000.0))
    fake.now = 10.0
    for job in (
        replace(waiting("large", 3, 4, None, "A100"), priority=100),
        replace(waiting("small", 4, 2, None, "H100"), priority=100),
        replace(waiting("equal", 5, 2, None, "H100"), priority=-100),
    ):
        fake.state.apply(JobSubmitted(fake.now, job))
    events = schedule_and_apply(fake)
    assert not [event for event in events if isinstance(event, StopRequested)]
    told = {event.job_id: event.reason for event in events if isinstance(event, AvailabilityChecked)}
    assert told["small"] is not None
    assert (told["small"].code, told["small"].evidence) == (
        NOT_EVALUATED,
        {"bound": "evictions_per_cycle"},
    )
    for name in ("large", "equal"):  # the one was looked at, the other has no right
        reason = told[name]
        assert reason is not None
        assert reason.code != NOT_EVALUATED
    again = fake.state.next_due(fake.now)
    assert again is not None
    fake.now = again
    stops = [event for event in schedule_and_apply(fake) if isinstance(event, StopRequested)]
    assert [(stop.job_id, stop.by) for stop in stops] == [("j2", "small")]


def test_a_search_that_failed_is_repeated_when_gpus_have_changed_hands() -> None:
    fake = FakeCluster(policy=Policy(queues={"default": QueuePolicy("default", preempt=Preempt.LOWER)}))
    fake.add_node("n", 4)
    stays = fake.submit(2, preemptible=False, priority=-100, behaviour=Behaviour(1000.0))
    fake.submit(2, priority=-100, behaviour=Behaviour(1000.0))
    fake.now = 10.0
    fake.state.apply(JobSubmitted(fake.now, replace(waiting("large", 3, 4, None), priority=100)))
    assert not [each for each in schedule_and_apply(fake) if isinstance(each, StopRequested)]
    fake.cancel(stays)
    while stays in fake.state.jobs:
        assert fake.step()
    fake.now += searches.AGAIN_S
    stops = [each for each in schedule_and_apply(fake) if isinstance(each, StopRequested)]
    assert [(stop.job_id, stop.by) for stop in stops] == [("j2", "large")]


def schedule_and_apply(fake: FakeCluster) -> Sequence[AvailabilityChecked | JobAdmitted | StopRequested]:
    events = cycle.schedule(fake.state, fake.now).events
    for event in events:
        fake.state.apply(event)
    return events
