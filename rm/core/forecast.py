"""When will it start? The core itself, run forward on predicted durations.

A twin of the state gets the live jobs and the nodes, and a clock of its own. Each running job ends when its
prediction says so (given how long it has run already), each admission starts at once, and `schedule` decides as it
would. The moment at which the job in question is admitted is the estimate. It is made twice, with everybody's
median and with everybody's 90th percentile: rough, but in the right order of size, and free of wishful thinking.
Where a job that stands in the way has no basis for a prediction (no history, no time limit) it never ends in the
twin, and if the job then never starts, that is said instead of a number.

Nodes that boot, or that an autoscaler is asked for, join the twin when boots of their type take so long (`Launches`).
Nothing further is asked for in the twin. Where the job starts on such nodes it is also said when it would start without
those that are asked for: what they cost buys the difference.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from rm.core.cycle import schedule
from rm.core.effects import Effect, Release, Reserve, Run, Stop
from rm.core.events import (
    Event,
    ForeignUseObserved,
    JobAdmitted,
    NodeJoined,
    PlacementReady,
    PlacementReleased,
    RunExited,
    RunStarted,
)
from rm.core.model import Cordon, Job, Outcome, Phase, Status
from rm.core.records import replace
from rm.core.state import ClusterState

MOST_JOBS = 5_000
MOST_STEPS = 3_000
_NEW = "new/"
"""How the ids of nodes begin that are not there yet."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds from now until the start: median and 90th percentile, None where there is no basis; and why.

    `gpu_type`: which of several acceptable GPU types it will get in the median case. `nodes`: the names of the nodes
    that are up on which it starts then. `new_nodes`: the types of those that are not there yet, one entry for each, and
    `price` what these cost in an hour, None where a type has no price. `wait_s`, `wait_nodes`: when and where it would
    start, in the median case, if nobody had asked for new nodes; None where there is no basis for that.
    """

    p50_s: float | None
    p90_s: float | None
    basis: str
    gpu_type: str | None = None
    nodes: tuple[str, ...] = ()
    new_nodes: tuple[str, ...] = ()
    price: float | None = None
    wait_s: float | None = None
    wait_nodes: tuple[str, ...] = ()


class Twin:
    """A copy of what matters, taken in an instant; `forecast` may then run in another thread."""

    def __init__(self, state: ClusterState, now: float) -> None:
        self._policy = state.policy
        self._jobs = list(state.jobs.values())
        self._nodes = list(state.nodes.values())
        self._cordons = list(state.cordons.values())
        self._usage = [(owner, usage) for owner, usage in state.books.usage.items()]
        self._predictor, self._remaining = state.predictor, state.remaining
        self._now = now
        launches = state.launches
        self._coming = launches.on_their_way(now)
        self._joins_at = {
            median: [launches.joins_at(each, state.policy, now, median=median) for each in self._coming]
            for median in (True, False)
        }

    def forecast(self, job_id: str) -> Forecast:
        """When the queued job `job_id` will start."""
        if len(self._jobs) > MOST_JOBS:
            return Forecast(None, None, f"more than {MOST_JOBS} jobs are live: no estimate is made")
        unknown: set[str] = set()
        starts = [self._run(job_id, median, unknown) for median in (True, False)]
        p50, p90 = (None if start is None else start.at - self._now for start in starts)
        if p50 is not None and p90 is not None:
            p90 = max(p50, p90)
        if p50 is None:
            names = ", ".join(sorted(unknown)[:3])
            why = (
                f"nothing is known of how long {names} will run"
                if unknown
                else "it does not start in the forecast"
            )
            return Forecast(None, None, why)
        start = starts[0]
        assert start is not None
        choice = any(job.id == job_id and len(job.gang.gpu_types) > 1 for job in self._jobs)
        gpu_type = start.gpu_type if choice else None
        nodes, new = self._places(start)
        basis = "the scheduler run forward on predicted durations"
        if not new:
            return Forecast(p50, p90, basis, gpu_type, nodes)
        basis += " and boot times"
        prices = [self._policy.prices.get(each) for each in new]
        price = None if None in prices else sum(each or 0.0 for each in prices)
        wait = self._run(job_id, True, set(), all_that_comes=False)
        if wait is None:
            return Forecast(p50, p90, basis, gpu_type, nodes, new, price)
        wait_names = (*self._places(wait)[0], *self._places(wait)[1])
        return Forecast(p50, p90, basis, gpu_type, nodes, new, price, wait.at - self._now, wait_names)

    def _places(self, start: JobAdmitted) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the nodes that are up, and the types of those that are not yet."""
        named = {node.id: node.name for node in self._nodes}
        ids = dict.fromkeys(each.node_id for each in start.placed)
        up = tuple(named[node_id] for node_id in ids if node_id in named)
        new = tuple(node_id.split("/", 2)[2] for node_id in ids if node_id not in named)
        return up, tuple(sorted(new))

    def _run(
        self, job_id: str, median: bool, unknown: set[str], *, all_that_comes: bool = True
    ) -> JobAdmitted | None:
        run = _Forward(self._policy_state(), self._now, median, unknown)
        run.load(self._jobs, self._nodes_joined(), self._cordons)
        run.expect(self._nodes_joining(median, all_that_comes))
        return run.start_of(job_id)

    def _nodes_joining(self, median: bool, all_that_comes: bool) -> Iterable[NodeJoined]:
        """The nodes on their way, each at its moment. Not all: only those for which nobody has asked."""
        for number, (coming, at) in enumerate(zip(self._coming, self._joins_at[median], strict=True)):
            if all_that_comes or not coming.jobs:
                shape = coming.shape
                node_id = f"{_NEW}{number}/{shape.name}"
                yield NodeJoined(
                    at,
                    node_id,
                    shape.name,
                    shape.gpu_slots,
                    shape.cpu_milli,
                    shape.memory_bytes,
                    shape.labels,
                )

    def _policy_state(self) -> ClusterState:
        twin = ClusterState(self._policy)
        twin.learns = False
        twin.launches.returnable = frozenset(node.id for node in self._nodes if node.returnable)
        twin.predictor, twin.remaining = self._predictor, self._remaining
        twin.books.adopt_usage(self._usage)
        return twin

    def _nodes_joined(self) -> Iterable[Event]:
        for node in self._nodes:
            yield NodeJoined(
                self._now, node.id, node.name, node.gpu_slots, node.cpu_milli, node.memory_bytes, node.labels
            )
            if node.foreign_units or node.foreign_cpu_milli or node.foreign_memory_bytes:
                yield ForeignUseObserved(
                    self._now, node.id, node.foreign_units, node.foreign_cpu_milli, node.foreign_memory_bytes
                )


class _Forward:
    """One run of the twin's clock."""

    def __init__(self, state: ClusterState, now: float, median: bool, unknown: set[str]) -> None:
        self._state = state
        self._now = now
        self._median = median
        self._unknown = unknown
        self._ends: list[tuple[float, str, int]] = []
        self._joins: list[tuple[float, int, NodeJoined]] = []

    def load(self, jobs: Iterable[Job], nodes: Iterable[Event], cordons: Iterable[Cordon]) -> None:
        effects = self._state.restore(jobs, cordons=cordons)
        for event in nodes:
            effects += self._state.apply(event)
        self._answer(effects)

    def expect(self, nodes: Iterable[NodeJoined]) -> None:
        """Nodes that will join, each at its time."""
        self._joins = sorted((each.at, number, each) for number, each in enumerate(nodes))

    def start_of(self, job_id: str) -> JobAdmitted | None:
        for _ in range(MOST_STEPS):
            for decision in schedule(self._state, self._now).events:
                if isinstance(decision, JobAdmitted) and decision.job_id == job_id:
                    return decision
                self._answer(self._state.apply(decision))
            if job_id not in self._state.jobs or not self._step():
                return None
        return None

    def _step(self) -> bool:
        """Go on to the next end, the next node, or the next moment that time alone brings."""
        alarm = self._state.next_due(self._now)
        while self._ends or self._joins:
            at = min(each[0][0] for each in (self._ends, self._joins) if each)
            if alarm is not None and alarm < at:
                break
            self._now = max(self._now, at)
            if self._joins and self._joins[0][0] <= at:
                _, _, node = self._joins.pop(0)
                self._answer(self._state.apply(replace(node, at=self._now)))
                return True
            _, job_id, attempt = heapq.heappop(self._ends)
            job = self._state.jobs.get(job_id)
            if job is None or job.attempt is None or job.attempt.number != attempt:
                continue
            self._exit(job)
            return True
        if alarm is None:
            return False
        self._now = alarm
        for stop in self._state.due(alarm):
            self._answer(self._state.apply(stop))
        return True

    def _exit(self, job: Job) -> None:
        assert job.attempt is not None
        done = Outcome(Status.SUCCEEDED)
        self._answer(self._state.apply(RunExited(self._now, job.id, job.attempt.number, done)))

    def _answer(self, effects: list[Effect]) -> None:
        """A world without delays."""
        while effects:
            effect = effects.pop()
            key = effect.job_id, effect.attempt
            job = self._state.jobs.get(effect.job_id)
            if job is None or job.attempt is None or job.attempt.number != effect.attempt:
                continue
            match effect:
                case Reserve():
                    effects += self._state.apply(PlacementReady(self._now, *key))
                case Run():
                    if job.attempt.phase is Phase.STARTING:
                        effects += self._state.apply(RunStarted(self._now, *key))
                    self._plan_end(self._state.jobs[effect.job_id])
                case Stop():
                    if job.attempt.phase in (Phase.STARTING, Phase.RUNNING):
                        stopped = Outcome(Status.FAILED, "stopped")
                        effects += self._state.apply(RunExited(self._now, *key, stopped))
                case Release():
                    effects += self._state.apply(PlacementReleased(self._now, *key))

    def _plan_end(self, job: Job) -> None:
        attempt = job.attempt
        if attempt is None or attempt.started_at is None:
            return
        ran_s = job.ran_s + max(0.0, self._now - attempt.started_at)
        prediction = self._state.predictor.predict(job, ran_s)
        if prediction is None:
            self._unknown.add(job.id)
            return
        total_s = prediction.p50_s if self._median else prediction.p90_s
        end = max(self._now, attempt.started_at + total_s - job.ran_s)
        heapq.heappush(self._ends, (end, job.id, attempt.number))
