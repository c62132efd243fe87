"""When will it start? The core itself, run forward on predicted durations.

A twin of the state gets the live jobs and the nodes, and a clock of its own. Each running job ends when its
prediction says so (given how long it has run already), each admission starts at once, and `schedule` decides as it
would. The moment at which the job in question is admitted is the estimate. It is made twice, with everybody's
median and with everybody's 90th percentile: rough, but in the right order of size, and free of wishful thinking.
Where a job that stands in the way has no basis for a prediction (no history, no time limit) it never ends in the
twin, and if the job then never starts, that is said instead of a number.
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
from rm.core.state import ClusterState

MOST_JOBS = 5_000
MOST_STEPS = 3_000


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds from now until the start: median and 90th percentile, None where there is no basis; and why.

    `gpu_type`: which of several acceptable GPU types it will get in the median case.
    """

    p50_s: float | None
    p90_s: float | None
    basis: str
    gpu_type: str | None = None


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
        choice = any(job.id == job_id and len(job.gang.gpu_types) > 1 for job in self._jobs)
        gpu_type = starts[0].gpu_type if starts[0] is not None and choice else None
        return Forecast(p50, p90, "the scheduler run forward on predicted durations", gpu_type)

    def _run(self, job_id: str, median: bool, unknown: set[str]) -> JobAdmitted | None:
        run = _Forward(self._policy_state(), self._now, median, unknown)
        run.load(self._jobs, self._nodes_joined(), self._cordons)
        return run.start_of(job_id)

    def _policy_state(self) -> ClusterState:
        twin = ClusterState(self._policy)
        twin.learns = False
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

    def load(self, jobs: Iterable[Job], nodes: Iterable[Event], cordons: Iterable[Cordon]) -> None:
        effects = self._state.restore(jobs, cordons=cordons)
        for event in nodes:
            effects += self._state.apply(event)
        self._answer(effects)

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
        """Go on to the next end, or to the next moment that time alone brings."""
        alarm = self._state.next_due(self._now)
        while self._ends:
            at, job_id, attempt = self._ends[0]
            if alarm is not None and alarm < at:
                break
            heapq.heappop(self._ends)
            job = self._state.jobs.get(job_id)
            if job is None or job.attempt is None or job.attempt.number != attempt:
                continue
            self._now = max(self._now, at)
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
