"""Our own scheduler on a virtual clock: the state and the cycle of `rm.core`, and a world that answers at once.

Theory of operation. Time jumps from event to event. All that happens at one instant (jobs end, jobs arrive, nodes
join or leave) is applied to the state first, then `schedule` decides once. An admission is followed by
PlacementReady and RunStarted at the same instant, an end by PlacementReleased: groups and processes cost nothing
here. An eviction ends the victim at once, and the cycle is asked again, as it would be by the writer.

A job makes progress while it runs. Every `checkpoint_s` of an attempt's run time its work is safe; an eviction
loses what came after the last of those moments, and the next attempt spends `restart_s` before it goes on. So for
each job: seconds with GPUs = its duration + what was lost. The state is told of checkpoints only where they can
matter: before a cycle that chooses by them, and before an eviction.

Durations are known to this module and to nobody else: the policy sees what `Predictor` has learnt from jobs that
have ended, no more.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from rm.core.cycle import schedule, why
from rm.core.effects import Effect, Release, Reserve, Run, Stop
from rm.core.events import (
    CheckpointReported,
    Event,
    JobAdmitted,
    JobSubmitted,
    PlacementReady,
    PlacementReleased,
    RunExited,
    RunStarted,
    StopRequested,
)
from rm.core.model import Gang, Job, Kind, NodeShape, Outcome, Status
from rm.core.policy import Order
from rm.core.policy import Policy as Rules
from rm.core.resources import GPU_UNIT, gpu_units
from rm.core.shapes import Request, resolve
from rm.core.state import ClusterState
from rm.errors import Infeasible, InternalError
from rm.sim.cluster import SimCluster
from rm.sim.fleet import Fleet
from rm.sim.outcomes import JobOutcome, Replay
from rm.sim.outcomes import Run as Stretch
from rm.sim.policy import Progress, silent
from rm.sim.rules import rules_for
from rm.sim.timeline import samples_of
from rm.sim.trace import TraceJob

STOPPED = Outcome(Status.FAILED, "stopped", signal=15)
DONE = Outcome(Status.SUCCEEDED)


@dataclass(frozen=True, slots=True)
class World:
    """What an eviction costs, and how long a node takes to come and may stay idle. Seconds."""

    checkpoint_s: float = 600.0
    restart_s: float = 60.0
    boot_s: float = 180.0
    idle_s: float = 300.0


@dataclass(frozen=True, slots=True)
class LivePolicy:
    """Our scheduler under some rules: a policy of the simulator. `rules`: without queues those of the trace."""

    name: str
    summary: str
    rules: Rules
    world: World = World()
    adjust: Callable[[Rules], Rules] = field(default=lambda rules: rules)
    """A last word on the rules when the trace's queues are in them: `--set`."""

    def replay(self, jobs: Sequence[TraceJob], cluster: SimCluster, progress: Progress = silent) -> Replay:
        """Raises Infeasible also where a job could start under these rules at no time, with the core's reason."""
        cluster.split(jobs)
        rules = self.adjust(rules_for(self.rules, jobs, cluster))
        return _Run(self.name, jobs, cluster, rules, self.world, progress).run()


@dataclass(slots=True, eq=False)
class _Live:
    """A job between submission and end. `left_s`: work that no checkpoint holds yet; `until`: end of the attempt."""

    job: TraceJob
    gang: Gang
    left_s: float
    attempt: int = 0
    started_at: float = 0.0
    until: float = inf
    lost_s: float = 0.0
    stretches: tuple[Stretch, ...] = ()


class _Run:
    """One replay."""

    def __init__(
        self,
        name: str,
        jobs: Sequence[TraceJob],
        cluster: SimCluster,
        rules: Rules,
        world: World,
        progress: Progress,
    ) -> None:
        self.now = jobs[0].submit_s if jobs else 0.0
        self._name = name
        self._jobs = jobs
        self._cluster = cluster
        self._world = world
        self._progress = progress
        self._state = ClusterState(rules)
        self._by_loss = rules.order is Order.SHORTEST_FIRST
        """Whether a cycle's choice may depend on losses even where it then evicts nobody."""
        self._fleet = Fleet(cluster, world.boot_s, world.idle_s)
        self._live: dict[str, _Live] = {}
        self._arrived = 0
        self._ends: list[tuple[float, int, int, _Live]] = []
        self._pushed = 0
        self._checkpoints: list[tuple[float, int, int, _Live]] = []
        self._gangs: dict[tuple[str, float, int | None, str], Gang] = {}
        self._outcomes: list[JobOutcome] = []

    def run(self) -> Replay:
        for event in self._fleet.open(self.now):
            self._state.apply(event)
        while len(self._outcomes) < len(self._jobs):
            self._instant()
            then = self._next()
            if then == inf and len(self._outcomes) < len(self._jobs):
                self._stuck()
            self.now = then
        ended_at = max((each.end_s for each in self._outcomes), default=self.now)
        sizes = self._fleet.sizes if self._cluster.grows else None
        return Replay(
            self._name,
            self._cluster,
            self._outcomes,
            None if sizes is None else samples_of(self._outcomes, sizes),
            self._fleet.bought_s(ended_at) / 3600,
        )

    # --- time ----------------------------------------------------------------------------------------------

    def _instant(self) -> None:
        """Everything that happens at `now`, then the decisions."""
        now, state = self.now, self._state
        ends = self._ends
        while ends and ends[0][0] <= now:
            _, _, attempt, live = heapq.heappop(ends)
            if live.attempt == attempt:
                self._apply(RunExited(now, live.job.job_id, attempt, DONE))
        while self._arrived < len(self._jobs) and self._jobs[self._arrived].submit_s <= now:
            self._submit(self._jobs[self._arrived])
            self._arrived += 1
        for due in state.due(now):
            self._apply(due)
        for event in self._fleet.come(now):
            self._apply(event)
        self._decide()
        if self._cluster.grows:
            left = self._fleet.adjust(state, now)
            for event in left:
                self._apply(event)
        for job in state.take_changes():
            if job.ended_at is not None:
                self._ended(job)

    def _next(self) -> float:
        ends = self._ends
        while ends and ends[0][3].attempt != ends[0][2]:
            heapq.heappop(ends)  # it was evicted
        then = ends[0][0] if ends else inf
        if self._arrived < len(self._jobs):
            then = min(then, self._jobs[self._arrived].submit_s)
        alarm = self._state.next_due(self.now)
        if alarm is not None and alarm < then:
            then = alarm
        return min(then, self._fleet.next_due())

    def _decide(self) -> None:
        """Cycles at this instant, until one evicts nobody."""
        state = self._state
        while len(state.pending):
            if self._by_loss:
                self._report_checkpoints()
            plan = schedule(state, self.now)
            if any(isinstance(each, StopRequested) for each in plan.events) and self._report_checkpoints():
                plan = schedule(state, self.now)
            evicted = False
            for event in plan.events:
                evicted |= isinstance(event, StopRequested)
                self._apply(event)
            if not evicted:
                return

    def _stuck(self) -> None:
        waiting = next((self._state.jobs[job_id] for job_id in self._state.pending.ids()), None)
        if waiting is None:
            raise InternalError("a replay has jobs left and nothing to wait for")
        reason = why(self._state, waiting, self.now)
        left = len(self._jobs) - len(self._outcomes)
        raise Infeasible(
            f"{self._name}: job {waiting.id} of queue {waiting.queue} never starts ({reason.code}: {reason.message}); "
            f"{left} of {len(self._jobs)} jobs are left at {self.now:.0f} s",
            field="policy",
        )

    # --- the world -----------------------------------------------------------------------------------------

    def _apply(self, event: Event) -> None:
        """Apply an event, and at once what the world makes of its effects."""
        if isinstance(event, JobAdmitted):
            self._live[event.job_id].attempt = event.attempt
        for effect in self._state.apply(event):
            self._answer(effect)

    def _answer(self, effect: Effect) -> None:
        now = self.now
        match effect:
            case Reserve():
                self._apply(PlacementReady(now, effect.job_id, effect.attempt))
            case Run():
                self._apply(RunStarted(now, effect.job_id, effect.attempt))
                self._start(self._live[effect.job_id])
            case Stop():
                self._evict(self._live[effect.job_id])
            case Release():
                self._close(self._live[effect.job_id])
                self._apply(PlacementReleased(now, effect.job_id, effect.attempt))

    def _submit(self, job: TraceJob) -> None:
        gang = self._gang(job)
        seq = self._arrived + 1
        owner = job.user or job.queue
        record = Job(
            job.job_id,
            seq,
            job.name,
            owner,
            Kind.COMMAND,
            gang,
            job.submit_s,
            queue=job.queue if job.queue in self._state.policy.queues else self._state.policy.default_queue,
            priority=job.priority,
            time_limit_s=job.time_limit_s,
            grace_s=0.0,
        )
        self._live[job.job_id] = _Live(job, gang, job.duration_s)
        self._apply(JobSubmitted(self.now, record))

    def _start(self, live: _Live) -> None:
        now = self.now
        live.started_at = now
        live.until = now + self._restart_s(live) + live.left_s
        self._pushed += 1
        heapq.heappush(self._ends, (live.until, self._pushed, live.attempt, live))
        if now + self._world.checkpoint_s < live.until:
            heapq.heappush(
                self._checkpoints, (now + self._world.checkpoint_s, self._pushed, live.attempt, live)
            )

    def _evict(self, live: _Live) -> None:
        """The job is stopped now, by the scheduler or by its time limit; the work since its last checkpoint is lost."""
        ran_s = self.now - live.started_at
        safe_s = self._last_checkpoint(live) - live.started_at
        kept_s = max(0.0, safe_s - self._restart_s(live))
        if safe_s > 0:
            self._apply(CheckpointReported(live.started_at + safe_s, live.job.job_id, live.attempt))
        live.left_s -= kept_s
        live.lost_s += ran_s - kept_s
        self._apply(RunExited(self.now, live.job.job_id, live.attempt, STOPPED))

    def _close(self, live: _Live) -> None:
        """The attempt's GPUs are free."""
        live.attempt = 0
        live.stretches = (*live.stretches, Stretch(live.started_at, self.now, live.job.num_gpus))

    def _ended(self, job: Job) -> None:
        live = self._live.pop(job.id)
        if job.status is Status.SUCCEEDED and len(live.stretches) > 1:
            live.lost_s += self._world.restart_s
        lost = live.lost_s * live.job.num_gpus
        self._outcomes.append(JobOutcome(live.job, live.stretches, lost))
        self._progress(len(self._outcomes))

    def _restart_s(self, live: _Live) -> float:
        """What the present attempt spends before it makes progress."""
        return self._world.restart_s if live.stretches else 0.0

    def _last_checkpoint(self, live: _Live) -> float:
        every = self._world.checkpoint_s
        return live.started_at + (self.now - live.started_at) // every * every

    def _report_checkpoints(self) -> bool:
        """Tell the state of the checkpoints up to now. False where it knew of all."""
        now, due, told = self.now, self._checkpoints, False
        while due and due[0][0] <= now:
            _, number, attempt, live = heapq.heappop(due)
            if live.attempt != attempt:
                continue
            at = self._last_checkpoint(live)
            self._state.apply(CheckpointReported(at, live.job.job_id, attempt))
            told = True
            heapq.heappush(due, (at + self._world.checkpoint_s, number, attempt, live))
        return told

    def _gang(self, job: TraceJob) -> Gang:
        key = job.queue, job.num_gpus, job.bundles, job.gpu_type
        gang = self._gangs.get(key)
        if gang is None:
            gang = self._gangs[key] = gang_of(job, self._cluster)
        return gang


def gang_of(job: TraceJob, cluster: SimCluster) -> Gang:
    """The gang that our scheduler makes of such a request on this cluster. Raises Infeasible or InvalidSpec."""
    shapes = [
        NodeShape(pool.gpus_per_node, 0, 0, labels, pool.nodes)
        for pool, labels in cluster.labelled()
        if cluster.serves(pool, job.queue)
    ]
    types = tuple(job.gpu_type.split("|")) if job.gpu_type and cluster.typed else ()
    units = gpu_units(job.num_gpus)
    if job.bundles is None:
        request = Request(units, gpu_types=types)
    else:
        request = Request(None, job.bundles, units // job.bundles, gpu_types=types)
    try:
        gang = resolve(request, shapes)
    except Infeasible as error:
        raise Infeasible(f"job {job.job_id}: {error}", field=error.field) from error
    if gang.bundle.gpu_units % GPU_UNIT and gang.bundle.gpu_units > GPU_UNIT:
        raise Infeasible(
            f"job {job.job_id}: {job.num_gpus:g} GPUs are neither whole nor a share", field="num_gpus"
        )
    return replace(gang, labels=())
