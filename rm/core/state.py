"""What is true: jobs, their attempts, and what is charged on each node.

Theory of operation. `ClusterState.apply(event) -> effects` is the only mutator. An event is a fact; the table
`_RULES` names, for each kind of event, the phases in which it is allowed and the function that applies it. News
of an attempt that is not the live one is dropped (an attempt number is never used twice, so this is the fence
against a runner that outlived its job). Anything else that the table does not allow is a bug of ours and raises
`InvalidTransition` with the job's story.

An attempt is charged to its nodes from `JobAdmitted` until `PlacementReleased`, never shorter: Ray removes groups
in the background, so GPUs whose release nobody has seen are not free.

    QUEUED ─admit─► RESERVING ─ready─► STARTING ─started─► RUNNING ─exited, lost─► RELEASING ─released─► terminal
      ▲                 │ failed           │ exited, lost                              ▲                 │
      │                 └──────────────────┴───────────────────────────────────────────┘                 │
      └──────────────────────────────────── retry ────────────────────────────────────────────────────── ┘

A job leaves `jobs` when it ends; `take_changes` hands the last record to the ledger, which keeps it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from rm.core.effects import Effect, Release, Reserve, Run, Stop
from rm.core.events import (
    AvailabilityChecked,
    Event,
    ForeignUseObserved,
    JobAdmitted,
    JobSubmitted,
    NodeJoined,
    NodeLost,
    NodeTypesObserved,
    PlacementReady,
    PlacementReleased,
    ReserveFailed,
    RunExited,
    RunLost,
    RunStarted,
    StopRequested,
)
from rm.core.model import (
    Attempt,
    Job,
    Kind,
    Node,
    NodeShape,
    Outcome,
    Phase,
    PlacedBundle,
    Status,
    StopCause,
)
from rm.core.resources import GPU_UNIT, Devices
from rm.errors import InternalError, InvalidTransition

INFRA_BACKOFF_S = 1.0
"""First delay before a job lost to infrastructure is tried again; doubled each time, up to the next bound."""
INFRA_BACKOFF_MOST_S = 60.0
STORY_LENGTH = 32
"""Events kept per live job for `InvalidTransition`."""


@dataclass(frozen=True, slots=True)
class Totals:
    """GPUs of the whole cluster in units: charged + foreign + free = capacity, up to nodes that just left."""

    capacity: int
    charged: int
    foreign: int
    free: int


class ClusterState:
    """The one mutable object of the core. Not thread-safe: one writer owns it (`runtime/writer.py`)."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.nodes: dict[str, Node] = {}
        self.launchable: tuple[NodeShape, ...] = ()
        self.queue: list[tuple[int, int, str]] = []
        """Queued jobs as (−priority, seq, id), sorted: the order in which they are considered."""
        self.version = 0
        """Grows with every change; an event that leaves it as it was said nothing new."""
        self._charged_on: dict[str, set[str]] = {}
        self._changed: dict[str, Job] = {}
        self._timed: dict[str, float] = {}
        """Jobs for which a moment matters: the deadline of a running one, the end of a back-off of a queued one."""
        self._story: dict[str, list[str]] = {}

    # --- reading -----------------------------------------------------------------------------------------

    def totals(self) -> Totals:
        capacity = charged = foreign = free = 0
        for node in self.nodes.values():
            capacity += node.gpu_slots * GPU_UNIT
            left = usable(node).total_free
            free += left
            held = node.gpu_slots * GPU_UNIT - node.devices.total_free
            charged += held
            foreign += node.gpu_slots * GPU_UNIT - held - left
        return Totals(capacity, charged, foreign, free)

    def node_shapes(self) -> tuple[NodeShape, ...]:
        """Every shape of node that the cluster has or could launch."""
        return self.present_shapes() + self.launchable

    def present_shapes(self) -> tuple[NodeShape, ...]:
        """The shapes of the nodes that are up, and how many there are of each."""
        counts: dict[NodeShape, int] = {}
        for node in self.nodes.values():
            shape = NodeShape(node.gpu_slots, node.cpu_milli, node.memory_bytes, _shared_labels(node.labels))
            counts[shape] = counts.get(shape, 0) + 1
        return tuple(replace(shape, most=count) for shape, count in counts.items())

    def due(self, now: float) -> list[StopRequested]:
        """The stops that time itself asks for. Called by the writer before each cycle."""
        return [
            StopRequested(now, job_id, StopCause.TIME_LIMIT)
            for job_id, moment in self._timed.items()
            if moment <= now and self.jobs[job_id].attempt is not None
        ]

    def next_due(self, now: float) -> float | None:
        """The next moment at which time alone changes something: a time limit, or the end of a back-off.

        A back-off that is over but still waits for capacity needs no clock: `now` leaves those out.
        """
        return min((moment for moment in self._timed.values() if moment > now), default=None)

    def take_changes(self) -> list[Job]:
        """The records changed since the last call, for the ledger. Ended jobs appear here for the last time."""
        changed = list(self._changed.values())
        self._changed = {}
        return changed

    # --- changing ----------------------------------------------------------------------------------------

    def apply(self, event: Event) -> list[Effect]:
        """Make `event` true and return what follows from it. Raises InvalidTransition for what can't be."""
        effects = _RULES[type(event)](self, event)
        job_id = event.job_id
        if job_id is not None and job_id in self.jobs:
            story = self._story.setdefault(job_id, [])
            story.append(f"{event.at:.3f} {type(event).__name__}")
            del story[:-STORY_LENGTH]
        return effects

    def restore(self, jobs: Iterable[Job]) -> list[Effect]:
        """Load live jobs from the ledger into an empty state; returns the effects that were under way.

        Nodes are not known yet: each one is charged for its bundles when it is observed (`NodeJoined`).
        """
        if self.jobs:
            raise InternalError("restore() needs an empty state")
        effects: list[Effect] = []
        for job in jobs:
            if job.status.terminal:
                raise InternalError(f"{job.id} has ended and can't be restored")
            self._put(job)
            if job.attempt is None:
                self._enqueue(job)
            else:
                self._charge(job.id, job.attempt.placed)
                effects += _resume(job, job.attempt)
        self._changed = {}
        return effects

    # --- rules, one per event ------------------------------------------------------------------------------

    def _submitted(self, event: JobSubmitted) -> list[Effect]:
        if event.job_id in self.jobs:
            raise self._invalid(self.jobs[event.job_id], event)
        self._put(replace(event.job, queued_at=event.at))
        self._enqueue(event.job)
        return []

    def _checked(self, event: AvailabilityChecked) -> list[Effect]:
        job = self.jobs.get(event.job_id)
        if job is not None and job.attempt is None:
            self._put(replace(job, reason=event.reason))
        return []

    def _admitted(self, event: JobAdmitted) -> list[Effect]:
        job = self.jobs[event.job_id]
        if job.attempt is not None or event.attempt != job.attempts + 1:
            raise self._invalid(job, event)
        self._dequeue(job)
        self._charge(job.id, event.placed)
        for placed in event.placed:
            node = self.nodes[placed.node_id]
            self.nodes[node.id] = _charged(node, job, placed, +1)
        attempt = Attempt(event.attempt, event.placed, Phase.RESERVING, event.at)
        self._put(replace(job, status=Status.RESERVING, attempt=attempt, attempts=event.attempt, reason=None))
        return [Reserve(job.id, event.attempt, job.gang, event.placed)]

    def _ready(self, event: PlacementReady) -> list[Effect]:
        live = self._live(event, Phase.RESERVING)
        if live is None:
            return []
        job, attempt = live
        if attempt.stop is not None:
            return self._end_attempt(job, attempt, Outcome(Status.CANCELLED))
        self._put(replace(job, attempt=replace(attempt, phase=Phase.STARTING)))
        return [Run(job.id, attempt.number, job.kind, job.gang, attempt.placed, job.grace_s)]

    def _reserve_failed(self, event: ReserveFailed) -> list[Effect]:
        live = self._live(event, Phase.RESERVING)
        if live is None:
            return []
        job, attempt = live
        # Somebody else was quicker, or the node is gone: nobody's fault, so it costs no retry.
        return self._end_attempt(job, attempt, Outcome(Status.QUEUED, event.why))

    def _started(self, event: RunStarted) -> list[Effect]:
        live = self._live(event, Phase.STARTING, Phase.RUNNING)
        if live is None:
            return []
        job, attempt = live
        if attempt.phase is Phase.RUNNING:
            return []  # a restarted allocator adopted the run and was told again
        status = job.status if attempt.stop else Status.RUNNING
        self._put(
            replace(
                job,
                status=status,
                first_started_at=job.first_started_at or event.at,
                attempt=replace(attempt, phase=Phase.RUNNING, started_at=event.at),
            )
        )
        return []

    def _exited(self, event: RunExited) -> list[Effect]:
        live = self._live(event, Phase.STARTING, Phase.RUNNING)
        return self._end_attempt(*live, event.outcome) if live else []

    def _lost(self, event: RunLost) -> list[Effect]:
        live = self._live(event, Phase.STARTING, Phase.RUNNING)
        if live is None:
            return []
        return self._end_attempt(*live, Outcome(Status.FAILED, event.why, infra=True))

    def _stop_requested(self, event: StopRequested) -> list[Effect]:
        job = self.jobs.get(event.job_id)
        if job is None:
            return []
        attempt = job.attempt
        if attempt is None:
            self._dequeue(job)
            self._finish(job, event.at, _stopped_while_queued(event))
            return []
        if attempt.stop is not None or attempt.phase is Phase.RELEASING:
            # Already on its way out. A stop that comes during a release still forbids the requeue.
            succeeded = attempt.outcome is not None and attempt.outcome.status is Status.SUCCEEDED
            if attempt.stop is None and not succeeded:
                self._put(replace(job, attempt=replace(attempt, stop=event.cause, stop_by=event.by)))
            return []
        stopped = replace(attempt, stop=event.cause, stop_by=event.by)
        self._put(replace(job, status=Status.STOPPING, attempt=stopped))
        return [Stop(job.id, attempt.number, job.grace_s)]

    def _released(self, event: PlacementReleased) -> list[Effect]:
        live = self._live(event, Phase.RELEASING)
        if live is None:
            return []
        job, attempt = live
        self._uncharge(job, attempt)
        outcome = attempt.outcome or Outcome(Status.FAILED, "no outcome was recorded", infra=True)
        final = _verdict(job, attempt, outcome)
        if final is None:
            self._requeue(job, outcome, event.at)
        else:
            self._finish(job, event.at, final)
        return []

    def _node_joined(self, event: NodeJoined) -> list[Effect]:
        node = Node(
            event.node_id,
            event.name,
            event.gpu_slots,
            Devices.whole(event.gpu_slots),
            event.cpu_milli,
            event.cpu_milli,
            event.memory_bytes,
            event.memory_bytes,
            event.labels,
        )
        for job_id in sorted(self._charged_on.get(node.id, ())):
            job = self.jobs[job_id]
            assert job.attempt is not None
            for placed in job.attempt.placed:
                if placed.node_id == node.id:
                    node = _charged(node, job, placed, +1)
        self.nodes[node.id] = node
        self.version += 1
        return []

    def _node_lost(self, event: NodeLost) -> list[Effect]:
        if self.nodes.pop(event.node_id, None) is None:
            return []
        self.version += 1
        # A running job's runner tells of its own death. A lease has none: nobody else would ever end it.
        effects: list[Effect] = []
        for job_id in sorted(self._charged_on.get(event.node_id, ())):
            job = self.jobs[job_id]
            if (
                job.kind is Kind.LEASE
                and job.attempt
                and job.attempt.phase in (Phase.STARTING, Phase.RUNNING)
            ):
                lost = Outcome(Status.FAILED, "a node of the lease died", node_id=event.node_id, infra=True)
                effects += self._end_attempt(job, job.attempt, lost)
        return effects

    def _foreign(self, event: ForeignUseObserved) -> list[Effect]:
        node = self.nodes.get(event.node_id)
        if node is not None:
            self.nodes[node.id] = replace(
                node,
                foreign_units=event.gpu_units,
                foreign_cpu_milli=event.cpu_milli,
                foreign_memory_bytes=event.memory_bytes,
            )
            self.version += 1
        return []

    def _node_types(self, event: NodeTypesObserved) -> list[Effect]:
        self.launchable = event.shapes
        self.version += 1
        return []

    # --- the moves that rules share ------------------------------------------------------------------------

    def _live(
        self,
        event: PlacementReady | ReserveFailed | RunStarted | RunExited | RunLost | PlacementReleased,
        *phases: Phase,
    ) -> tuple[Job, Attempt] | None:
        """The job and attempt that the event is about, or None where it is old news."""
        job = self.jobs.get(event.job_id)
        if job is None or job.attempt is None or job.attempt.number != event.attempt:
            return None
        if job.attempt.phase not in phases:
            if _PHASES.index(job.attempt.phase) > max(_PHASES.index(phase) for phase in phases):
                return None  # said before: effects are carried out again after a restart
            raise self._invalid(job, event)
        return job, job.attempt

    def _end_attempt(self, job: Job, attempt: Attempt, outcome: Outcome) -> list[Effect]:
        ended = replace(attempt, phase=Phase.RELEASING, outcome=outcome)
        self._put(replace(job, status=Status.STOPPING, attempt=ended))
        return [Release(job.id, attempt.number, job.gang, attempt.placed)]

    def _requeue(self, job: Job, outcome: Outcome, now: float) -> None:
        infra = job.infra_failures + outcome.infra
        failed = outcome.status is Status.FAILED and not outcome.infra
        delay = 0.0 if failed else min(INFRA_BACKOFF_MOST_S, INFRA_BACKOFF_S * 2 ** max(0, infra - 1))
        queued = replace(
            job,
            status=Status.QUEUED,
            attempt=None,
            infra_failures=infra,
            failures=job.failures + failed,
            eligible_at=now + delay if delay else 0.0,
            queued_at=now,
            outcome=outcome,
        )
        self._put(queued)
        self._enqueue(queued)

    def _finish(self, job: Job, now: float, outcome: Outcome) -> None:
        self._put(
            replace(job, status=outcome.status, attempt=None, outcome=outcome, ended_at=now, reason=None)
        )
        del self.jobs[job.id]
        self._timed.pop(job.id, None)
        self._story.pop(job.id, None)

    def _put(self, job: Job) -> None:
        self.jobs[job.id] = job
        self._changed[job.id] = job
        self.version += 1
        moment = _moment(job)
        if moment is None:
            self._timed.pop(job.id, None)
        else:
            self._timed[job.id] = moment

    def _enqueue(self, job: Job) -> None:
        insort(self.queue, (*job.order_key, job.id))

    def _dequeue(self, job: Job) -> None:
        index = bisect_left(self.queue, (*job.order_key, job.id))
        if index == len(self.queue) or self.queue[index][2] != job.id:
            raise InternalError(f"{job.id} is {job.status} but not in the queue")
        del self.queue[index]

    def _charge(self, job_id: str, placed: Iterable[PlacedBundle]) -> None:
        for bundle in placed:
            self._charged_on.setdefault(bundle.node_id, set()).add(job_id)

    def _uncharge(self, job: Job, attempt: Attempt) -> None:
        for placed in attempt.placed:
            self._charged_on.get(placed.node_id, set()).discard(job.id)
            node = self.nodes.get(placed.node_id)
            if node is not None:
                self.nodes[node.id] = _charged(node, job, placed, -1)

    def _invalid(self, job: Job, event: Event) -> InvalidTransition:
        phase = job.attempt.phase if job.attempt else job.status
        return InvalidTransition(
            f"{type(event).__name__} is not allowed for {job.id} in {phase}",
            job=job.id,
            state=str(phase),
            event=repr(event),
            story=list(self._story.get(job.id, [])),
        )

    # --- self-check --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every invariant of this module, recomputed from scratch. Raises InternalError. Run in tests."""
        queued = sorted((*job.order_key, job.id) for job in self.jobs.values() if job.attempt is None)
        _require(queued == self.queue, f"queue {self.queue} is not what the jobs say: {queued}")
        charged_on: dict[str, set[str]] = {}
        nodes = {
            node.id: replace(
                node,
                devices=Devices.whole(node.gpu_slots),
                cpu_free_milli=node.cpu_milli,
                memory_free_bytes=node.memory_bytes,
            )
            for node in self.nodes.values()
        }
        for job in self.jobs.values():
            _require(not job.status.terminal, f"{job.id} has ended and is still here")
            _require((job.attempt is None) == (job.status is Status.QUEUED), f"{job.id}: {job.status}")
            if job.attempt is None:
                continue
            _require(len(job.attempt.placed) == job.gang.count, f"{job.id}: a gang is whole or absent")
            _require(job.attempt.number == job.attempts, f"{job.id}: attempt numbers")
            for placed in job.attempt.placed:
                charged_on.setdefault(placed.node_id, set()).add(job.id)
                if placed.node_id in nodes:
                    nodes[placed.node_id] = _charged(nodes[placed.node_id], job, placed, +1)
        _require(nodes == self.nodes, "the nodes' free amounts are not capacity minus live attempts")
        live = {node: jobs for node, jobs in self._charged_on.items() if jobs}
        timed = {job.id: moment for job in self.jobs.values() if (moment := _moment(job)) is not None}
        _require(timed == self._timed, f"moments {self._timed} are not what the jobs say: {timed}")
        _require(live == charged_on, f"charges by node {live} are not what the attempts say: {charged_on}")


def usable(node: Node) -> Devices:
    """What is free on the node for us: after our own charges and after what strangers hold."""
    return node.devices.without_foreign(node.foreign_units)


def _charged(node: Node, job: Job, placed: PlacedBundle, sign: int) -> Node:
    bundle = job.gang.bundle
    move = node.devices.give if sign < 0 else node.devices.take_slots
    return replace(
        node,
        devices=move(placed.slots, bundle.gpu_units),
        cpu_free_milli=node.cpu_free_milli - sign * bundle.cpu_milli,
        memory_free_bytes=node.memory_free_bytes - sign * bundle.memory_bytes,
    )


def _moment(job: Job) -> float | None:
    """When time alone will change something for this job."""
    attempt = job.attempt
    if attempt is None:
        return job.eligible_at or None
    if job.time_limit_s is None or attempt.started_at is None or attempt.stop is not None:
        return None
    return attempt.started_at + job.time_limit_s if attempt.phase is Phase.RUNNING else None


def _resume(job: Job, attempt: Attempt) -> list[Effect]:
    """The effect that was under way for a live attempt when the allocator stopped."""
    effects: list[Effect]
    match attempt.phase:
        case Phase.RESERVING:
            effects = [Reserve(job.id, attempt.number, job.gang, attempt.placed)]
        case Phase.STARTING | Phase.RUNNING:
            effects = [Run(job.id, attempt.number, job.kind, job.gang, attempt.placed, job.grace_s)]
        case Phase.RELEASING:
            return [Release(job.id, attempt.number, job.gang, attempt.placed)]
    if attempt.stop is not None:
        effects.append(Stop(job.id, attempt.number, job.grace_s))
    return effects


_PHASES = list(Phase)
"""In the order in which an attempt passes them."""

_STOPPED: dict[StopCause, tuple[Status, str]] = {
    StopCause.CANCELLED: (Status.CANCELLED, "cancelled"),
    StopCause.TIME_LIMIT: (Status.TIMED_OUT, "its time limit passed"),
    StopCause.HOLDER_LOST: (Status.CANCELLED, "the process that held it went away"),
    StopCause.RELEASED: (Status.SUCCEEDED, "released by its holder"),
}


def _stopped_while_queued(event: StopRequested) -> Outcome:
    status, message = _STOPPED[event.cause]
    by = f" by {event.by}" if event.by else ""
    return Outcome(status, f"{message}{by} while it was queued")


def _verdict(job: Job, attempt: Attempt, outcome: Outcome) -> Outcome | None:
    """The job's end, or None where it is to be tried again. First match wins."""
    if attempt.stop is not None:
        status, message = _STOPPED[attempt.stop]
        by = f" by {attempt.stop_by}" if attempt.stop_by else ""
        return replace(outcome, status=status, message=f"{message}{by}")
    if outcome.status is Status.SUCCEEDED:
        return outcome
    if outcome.status is Status.QUEUED:
        return None
    if outcome.infra and job.kind is not Kind.LEASE and job.infra_failures < job.max_infra_retries:
        return None
    if not outcome.infra and job.failures < job.max_retries:
        return None
    return replace(outcome, status=Status.FAILED)


def _shared_labels(labels: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Labels that nodes of one type share: without those that name a single node."""
    return tuple((key, value) for key, value in labels if key != "ray.io/node-id")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InternalError(f"state check: {message}")


_RULES: dict[type, Callable[..., list[Effect]]] = {
    JobSubmitted: ClusterState._submitted,
    AvailabilityChecked: ClusterState._checked,
    JobAdmitted: ClusterState._admitted,
    PlacementReady: ClusterState._ready,
    ReserveFailed: ClusterState._reserve_failed,
    RunStarted: ClusterState._started,
    RunExited: ClusterState._exited,
    RunLost: ClusterState._lost,
    StopRequested: ClusterState._stop_requested,
    PlacementReleased: ClusterState._released,
    NodeJoined: ClusterState._node_joined,
    NodeLost: ClusterState._node_lost,
    ForeignUseObserved: ClusterState._foreign,
    NodeTypesObserved: ClusterState._node_types,
}
