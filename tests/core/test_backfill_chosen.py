"""Where no end is known the choice of a place is remembered, and must be what would be chosen afresh."""

from __future__ import annotations

from random import Random

import pytest

from rm.core.backfill import Fresh, reserve
from rm.core.cycle import schedule
from rm.core.events import (
    JobAdmitted,
    JobSubmitted,
    NodeCordoned,
    NodeJoined,
    NodeLost,
    NodeUncordoned,
    PlacementReady,
    PlacementReleased,
    RunExited,
    RunStarted,
)
from rm.core.model import Attempt, Gang, Job, Kind, Outcome, Phase, Status, Strategy
from rm.core.placement import place
from rm.core.policy import Policy
from rm.core.reservations import Promised
from rm.core.resources import GPU_UNIT, Amount, Bundle, gpu_units
from rm.core.state import ClusterState

ONE = Gang(Bundle(GPU_UNIT))
GANGS = (
    Gang(Bundle(GPU_UNIT // 2)),
    Gang(Bundle(4 * GPU_UNIT)),
    Gang(Bundle(8 * GPU_UNIT)),
    Gang(Bundle(8 * GPU_UNIT), 2),
    Gang(Bundle(3 * GPU_UNIT), 4),
    Gang(Bundle(2 * GPU_UNIT), 6, Strategy.SPREAD),
    Gang(Bundle(GPU_UNIT), 5, Strategy.STRICT_SPREAD),
    Gang(Bundle(2 * GPU_UNIT, cpu_milli=20_000), 3),
)
RUNNING = ((0.5, 1), (0.5, 1), (1, 1), (1, 1), (2, 1), (4, 1), (8, 1), (2, 4), (3, 3))


def job_of(seq: int, gang: Gang, limit_s: float | None = None) -> Job:
    return Job(f"j{seq}", seq, "job", "someone", Kind.COMMAND, gang, 0.0, time_limit_s=limit_s)


class World:
    """Jobs come and go, one at a time; who starts runs at once. Now and then one has a time limit."""

    def __init__(self, seed: int) -> None:
        self.rng, self.now, self.seq = Random(seed), 0.0, 0
        self.state = ClusterState(Policy())
        for _ in range(6):
            self.add_node()

    def add_node(self) -> None:
        self.seq += 1
        self.state.apply(NodeJoined(self.now, f"n{self.seq}", f"n{self.seq}", 8, 64_000, 2**38))

    def end(self, job_id: str) -> None:
        attempt = self.state.jobs[job_id].attempts
        if job_id not in self.state.books.ending:
            self.state.apply(RunExited(self.now, job_id, attempt, Outcome(Status.SUCCEEDED)))
        self.state.apply(PlacementReleased(self.now, job_id, attempt))

    def step(self) -> None:
        self.now += 1.0
        for job_id in list(self.state.books.ending):
            self.end(job_id)
        what, state = self.rng.randrange(20), self.state
        node_id = self.rng.choice(sorted(state.nodes))
        runs = sorted(job.id for job in state.jobs.values() if job.attempt is not None)
        if what == 0:
            self.add_node()
        elif what == 1 and len(state.nodes) > 4:
            for job_id in sorted(state.books.charged_on.get(node_id, ())):
                self.end(job_id)
            state.apply(NodeLost(self.now, node_id))
        elif what == 2:
            state.apply(NodeCordoned(self.now, node_id, "someone", ""))
        elif what == 3:
            state.apply(NodeUncordoned(self.now, node_id, "someone"))
        elif what == 4 and runs:
            job = state.jobs[self.rng.choice(runs)]
            state.apply(RunExited(self.now, job.id, job.attempts, Outcome(Status.SUCCEEDED)))
        elif what < 12 or not runs:
            self.seq += 1
            gpus, count = self.rng.choice(RUNNING)
            limit_s = 3.0 if self.rng.random() < 0.02 else None
            job = job_of(self.seq, Gang(Bundle(gpu_units(gpus)), count), limit_s)
            state.apply(JobSubmitted(self.now, job))
        else:
            self.end(self.rng.choice(runs))
        for event in schedule(state, self.now).events:
            state.apply(event)
            if isinstance(event, JobAdmitted):
                state.apply(PlacementReady(self.now, event.job_id, event.attempt))
                state.apply(RunStarted(self.now, event.job_id, event.attempt))

    def just_admitted(self) -> Fresh:
        """A job of one GPU that ends soon, charged where it fits, as a cycle would in its trial."""
        places = place(ONE, self.state.capacity)
        if places is None:
            return ()
        self.state.capacity.take(ONE.bundle, places)
        return ((self.now + 5.0, job_of(9_999, ONE), Attempt(1, places, Phase.RESERVING, self.now)),)

    def reserved_twice(self, job: Job, promised: Promised, fresh: Fresh) -> tuple[bool, bool]:
        """With what is remembered and without: whether that was of use, and whether both are the same."""
        classes, plans = self.state.capacity.matching(job.gang), self.state.plans
        before = dict(plans.get("chosen", {}))  # type: ignore[call-overload]
        found = reserve(job, self.state, classes, promised, self.now, fresh)
        remembered = plans.pop("chosen", {})
        afresh = reserve(job, self.state, classes, promised, self.now, fresh)
        used = found is not None and "chosen" in plans and remembered == before
        plans["chosen"] = remembered
        return used, found == afresh


@pytest.mark.parametrize("seed", range(6))
def test_what_is_remembered_is_what_would_be_chosen(seed: int) -> None:
    world, uses = World(seed), 0
    capacity, waiting = world.state.capacity, [job_of(10_000 + each, gang) for each, gang in enumerate(GANGS)]
    for _ in range(160):
        world.step()
        owed = {world.rng.choice(sorted(world.state.nodes)): Amount(4 * GPU_UNIT)}
        for job in waiting:
            for promised, some_fresh in (
                (Promised({}), False),
                (Promised(owed), False),
                (Promised({}), True),
            ):
                mark = capacity.mark()
                fresh = world.just_admitted() if some_fresh else ()
                used, same = world.reserved_twice(job, promised, fresh)
                capacity.rollback(mark)
                assert same, f"{job.gang}, {promised}, {fresh}"
                uses += used
    assert uses > 20
