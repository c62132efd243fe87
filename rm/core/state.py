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
      └──────────────────────────────── retry, eviction ──────────────────────────────────────────────── ┘

A job leaves `jobs` when it ends; `take_changes` hands the last record to the ledger, which keeps it. Everything
that the scheduler needs besides the records (`capacity`, `pending`, `books`) follows from them and is kept up to
date here, one change at a time, so that a cycle never walks all jobs or all nodes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping

from rm.core.books import Books, Owner
from rm.core.capacity import Capacity, Totals, charged
from rm.core.effects import Effect, Release, Reserve, Run, Stop
from rm.core.events import (
    AvailabilityChecked,
    CheckpointReported,
    CordonInherited,
    Event,
    ForeignUseObserved,
    GangCut,
    GpuErrorsSeen,
    GpusQuarantined,
    HoldChanged,
    JobAdmitted,
    JobSubmitted,
    LaunchesObserved,
    LaunchFailed,
    NodeCordoned,
    NodeJoined,
    NodeLost,
    NodeTypesObserved,
    NodeUncordoned,
    PlacementReady,
    PlacementReleased,
    PolicyChanged,
    ReserveFailed,
    RunExited,
    RunLost,
    RunStarted,
    StopRequested,
)
from rm.core.fairshare import Usage
from rm.core.gittins import Remaining
from rm.core.health import BY, Failure, Health
from rm.core.launches import Launches
from rm.core.model import (
    Attempt,
    Cordon,
    Job,
    Kind,
    Node,
    NodeShape,
    Outcome,
    Phase,
    Quarantine,
    Status,
    StopCause,
)
from rm.core.pending import Pending
from rm.core.policy import Policy
from rm.core.predict import Predictor
from rm.core.records import replace
from rm.core.resources import GPU_UNIT, Devices
from rm.errors import InternalError, InvalidTransition

INFRA_BACKOFF_S = 1.0
"""First delay before a job lost to infrastructure is tried again; doubled each time, up to the next bound."""
INFRA_BACKOFF_MOST_S = 60.0
STORY_LENGTH = 32
"""Events kept per live job for `InvalidTransition`."""


class ClusterState:
    """The one mutable object of the core. Not thread-safe: one writer owns it (`runtime/writer.py`)."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.jobs: dict[str, Job] = {}
        self.capacity = Capacity()
        self.launches = Launches()
        self.cordons: dict[str, Cordon] = {}
        """By node id, whether the node is there or not: one that comes back is still cordoned."""
        self.quarantines: dict[str, Quarantine] = {}
        """By node id, of nodes that are there. Not stored: what keeps the GPUs outlives the allocator and tells it."""
        self.uncut: dict[str, None] = {}
        """Queued jobs that are to be cut as soon as the node types are known (`scaleup.cuts`)."""
        self.idle_since: dict[str, float] = {}
        """By node id, since when nobody holds a GPU there, of those where nobody does."""
        self.health = Health()
        self.predictor = Predictor()
        self.remaining = Remaining()
        self.learns = True
        """False in a twin that runs ahead: what it imagines is no experience."""
        self.pending = Pending(self.policy)
        self.books = Books(self.policy, {}, self.predictor)
        self.version = 0
        """Grows with every change; an event that leaves it as it was said nothing new."""
        self.wake_at: float | None = None
        """The cycle's wish to be asked again at this time: somebody may be evicted then."""
        self.plans: dict[str, object] = {}
        """The cycle's notes from one run to the next (reservations). A cache: it may be emptied at any time."""
        self._now = 0.0
        self._changed: dict[str, Job] = {}
        self._usage_changed: set[Owner] = set()
        self._cordons_changed: set[str] = set()
        self._story: dict[str, list[tuple[float, type]]] = {}

    # --- reading -----------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Mapping[str, Node]:
        return self.capacity.nodes

    def totals(self) -> Totals:
        return self.capacity.totals()

    @property
    def launchable(self) -> tuple[NodeShape, ...]:
        """The shapes of node that could join, and how many of each beyond those that are up."""
        return self.launches.shapes()

    def node_shapes(self) -> tuple[NodeShape, ...]:
        """Every shape of node that the cluster has or could launch."""
        return self.capacity.shapes() + self.launchable

    def present_shapes(self) -> tuple[NodeShape, ...]:
        """The shapes of the nodes that are up, and how many there are of each."""
        return self.capacity.shapes()

    def open_shapes(self) -> tuple[NodeShape, ...]:
        """The same without nodes that are cordoned."""
        return self.capacity.shapes(with_cordoned=False)

    def due(self, now: float) -> list[StopRequested | NodeCordoned | CordonInherited | LaunchFailed]:
        """What follows from the state and the time alone. Called before each cycle, after what has happened.

        Stops by time limits and by the deadlines of drains; cordons of nodes that fail too often, or that came back;
        node types of which no node joins, or a smaller one than they declare.
        """
        events: list[StopRequested | NodeCordoned | CordonInherited | LaunchFailed] = [
            StopRequested(now, job_id, StopCause.TIME_LIMIT)
            for _, job_id in self.books.deadlines[: self._due_until(now)]
        ]
        events += self._drains_due(now)
        events += self._failing(now)
        events += self._came_back(now)
        events += [
            LaunchFailed(now, name, why) for name, why in list(self.launches.failing(self.policy, now))
        ]
        return events

    def _drains_due(self, now: float) -> Iterable[StopRequested]:
        overdue = [each for each in self._draining() if each.deadline is not None and each.deadline <= now]
        stops: dict[str, str] = {}
        for cordon in overdue:
            for job_id in sorted(self.books.charged_on.get(cordon.node_id, ())):
                attempt = self.jobs[job_id].attempt
                assert attempt is not None
                if attempt.stop is None and attempt.phase is not Phase.RELEASING:
                    stops.setdefault(job_id, self._named(cordon.node_id))
        return [StopRequested(now, job_id, StopCause.DRAINED, by) for job_id, by in stops.items()]

    def _draining(self) -> list[Cordon]:
        return [each for each in self.cordons.values() if each.draining]

    def _named(self, node_id: str) -> str:
        # With a word before it: by itself a node's name could be taken for a job's id.
        return f"node {self.capacity[node_id].name if node_id in self.capacity else node_id[:8]}"

    def _failing(self, now: float) -> Iterable[NodeCordoned]:
        left = None
        for node_id, why in self.health.failing(self.policy, now):
            if node_id not in self.capacity or node_id in self.cordons:
                continue
            # The last node may be broken, or all of them: either way somebody has to look, and jobs that fail say so.
            left = (self.capacity.open_nodes() if left is None else left) - 1
            if left < 1:
                return
            yield NodeCordoned(now, node_id, BY, why)

    def _came_back(self, now: float) -> list[CordonInherited]:
        """Cordoned nodes that are gone, each with the node that has their name now, where just one has it."""
        gone = {
            each.name: each.node_id
            for each in sorted(self.cordons.values(), key=lambda each: each.at)
            if each.gone_at is not None and each.name
        }
        if not gone:
            return []
        heirs: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            if node.name in gone:
                heirs.setdefault(node.name, []).append(node)
        return [
            CordonInherited(now, nodes[0].id, gone[name])
            for name, nodes in sorted(heirs.items())
            if len(nodes) == 1 and not nodes[0].cordoned
        ]

    def next_due(self, now: float) -> float | None:
        """The next moment at which time alone changes something: a time limit, the end of a pause, an age, a drain,
        the pause of a node type.

        A pause that is over but whose job still waits for capacity needs no clock: `now` leaves those out.
        """
        moments = [moment for moment, _ in self.books.deadlines[self._due_until(now) :][:1]]
        drains = [each.deadline for each in self._draining() if each.node_id in self.books.charged_on]
        launches = self.launches.next_moment(self.policy, now)
        for moment in (self.pending.next_moment(), self.wake_at, launches, *drains):
            if moment is not None and moment > now:
                moments.append(moment)
        return min(moments, default=None)

    def _due_until(self, now: float) -> int:
        return bisect_right(self.books.deadlines, now, key=lambda each: each[0])

    def take_changes(self) -> list[Job]:
        """The records changed since the last call, for the ledger. Ended jobs appear here for the last time."""
        changed = list(self._changed.values())
        self._changed = {}
        return changed

    def take_usage(self) -> list[tuple[Owner, Usage]]:
        """The owners' averages that changed since the last call, for the ledger."""
        changed = [(owner, self.books.usage[owner]) for owner in sorted(self._usage_changed)]
        self._usage_changed = set()
        return changed

    def take_cordons(self) -> dict[str, Cordon | None]:
        """By node id, the cordons that changed since the last call, for the ledger; None where one was lifted."""
        changed = {node_id: self.cordons.get(node_id) for node_id in sorted(self._cordons_changed)}
        self._cordons_changed = set()
        return changed

    # --- changing ----------------------------------------------------------------------------------------

    def apply(self, event: Event) -> list[Effect]:
        """Make `event` true and return what follows from it. Raises InvalidTransition for what can't be."""
        self._now = event.at
        effects = _RULES[type(event)](self, event)
        job_id = event.job_id
        if job_id is not None and job_id in self.jobs:
            story = self._story.setdefault(job_id, [])
            story.append((event.at, type(event)))
            if len(story) > STORY_LENGTH:
                del story[0]
        return effects

    def restore(
        self,
        jobs: Iterable[Job],
        usage: Iterable[tuple[Owner, Usage]] = (),
        ended: Iterable[Job] = (),
        cordons: Iterable[Cordon] = (),
    ) -> list[Effect]:
        """Load live jobs from the ledger into an empty state; returns the effects that were under way.

        Nodes are not known yet: each one is charged for its bundles when it is observed (`NodeJoined`).
        `ended`: the latest ended jobs, oldest first, from which durations are learnt.
        """
        if self.jobs:
            raise InternalError("restore() needs an empty state")
        self.cordons = {each.node_id: each for each in cordons}
        for job in ended:
            # Of a job that ran more than once the record does not tell how long it waited in between.
            whole = job.attempts == 1 and not (job.outcome is not None and job.outcome.infra)
            if whole and job.first_started_at is not None and job.ended_at is not None:
                self._learn(job, job.ended_at - job.first_started_at)
        effects: list[Effect] = []
        for job in jobs:
            if job.status.terminal:
                raise InternalError(f"{job.id} has ended and can't be restored")
            self._now = job.attempt.admitted_at if job.attempt else job.submitted_at
            self._put(job)
            if job.attempt is not None:
                effects += _resume(job, job.attempt)
        self.books.adopt_usage(usage)
        self._changed = {}
        self._usage_changed = set()
        return effects

    # --- rules, one per event ------------------------------------------------------------------------------

    def _submitted(self, event: JobSubmitted) -> list[Effect]:
        if event.job_id in self.jobs:
            raise self._invalid(self.jobs[event.job_id], event)
        self._put(replace(event.job, queued_at=event.at))
        return []

    def _checked(self, event: AvailabilityChecked) -> list[Effect]:
        job = self.jobs.get(event.job_id)
        if job is not None and job.attempt is None:
            self._put(replace(job, reason=event.reason), moved=False)
        return []

    def _admitted(self, event: JobAdmitted) -> list[Effect]:
        job = self.jobs[event.job_id]
        if job.attempt is not None or event.attempt != job.attempts + 1:
            raise self._invalid(job, event)
        if job.held or job.after or not job.gang.minimum <= len(event.placed) <= job.gang.count:
            raise self._invalid(job, event)
        self.capacity.take(job.gang.bundle, event.placed)
        attempt = Attempt(event.attempt, event.placed, Phase.RESERVING, event.at, gpu_type=event.gpu_type)
        admitted = replace(
            job, status=Status.RESERVING, attempt=attempt, attempts=event.attempt, reason=None, uncut=False
        )
        self._put(admitted)
        self._note_idle({each.node_id for each in event.placed}, event.at)
        return [Reserve(job.id, event.attempt, job.gang.sized(len(event.placed)), event.placed)]

    def _ready(self, event: PlacementReady) -> list[Effect]:
        live = self._live(event, Phase.RESERVING)
        if live is None:
            return []
        job, attempt = live
        if attempt.stop is not None:
            return self._end_attempt(job, attempt, Outcome(Status.CANCELLED))
        self._put(replace(job, attempt=replace(attempt, phase=Phase.STARTING, stand=event.stand)))
        gang = job.gang.sized(len(attempt.placed))
        return [Run(job.id, attempt.number, job.kind, gang, attempt.placed, job.grace_s, job.array_index)]

    def _reserve_failed(self, event: ReserveFailed) -> list[Effect]:
        live = self._live(event, Phase.RESERVING)
        if live is None:
            return []
        job, attempt = live
        self._note_failure(job, attempt, event.node_id, event.why)
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
        if live is None:
            return []
        if event.outcome.infra:
            self._note_failure(*live, event.outcome.node_id, event.outcome.message)
        return self._end_attempt(*live, event.outcome)

    def _lost(self, event: RunLost) -> list[Effect]:
        live = self._live(event, Phase.STARTING, Phase.RUNNING)
        if live is None:
            return []
        self._note_failure(*live, event.node_id, event.why)
        return self._end_attempt(*live, Outcome(Status.FAILED, event.why, node_id=event.node_id, infra=True))

    def _stop_requested(self, event: StopRequested) -> list[Effect]:
        job = self.jobs.get(event.job_id)
        if job is None:
            return []
        attempt = job.attempt
        if attempt is None:
            if event.cause.comes_back:
                return []
            self._finish(job, event.at, _stopped_while_queued(event))
            return []
        if attempt.phase is Phase.RELEASING or attempt.stop is not None:
            # Already on its way out. A stop that comes later still forbids the requeue.
            succeeded = attempt.outcome is not None and attempt.outcome.status is Status.SUCCEEDED
            overrules = attempt.stop is None or attempt.stop.comes_back
            if overrules and not event.cause.comes_back and not succeeded:
                self._put(replace(job, attempt=replace(attempt, stop=event.cause, stop_by=event.by)))
            return []
        stopped = replace(attempt, stop=event.cause, stop_by=event.by)
        self._put(replace(job, status=Status.STOPPING, attempt=stopped))
        return [Stop(job.id, attempt.number, job.grace_s)]

    def _hold_changed(self, event: HoldChanged) -> list[Effect]:
        job = self.jobs.get(event.job_id)
        if job is None or job.held == event.held:
            return []
        self._put(replace(job, held=event.held, held_by=event.by if event.held else "", reason=None))
        return []

    def _checkpoint(self, event: CheckpointReported) -> list[Effect]:
        live = self._live(event, Phase.STARTING, Phase.RUNNING)
        if live is not None:
            job, attempt = live
            self._put(replace(job, attempt=replace(attempt, checkpoint_at=event.at)))
        return []

    def _policy_changed(self, event: PolicyChanged) -> list[Effect]:
        old = self.books
        for usage in old.usage.values():
            usage.settle(event.at, self.policy.half_life_s)
        self.policy = event.policy
        self.books = Books(self.policy, self._gpus_by_type(), self.predictor)
        self.pending = Pending(self.policy)
        self.plans = {}
        for job in self.jobs.values():
            self.books.changed(None, job, event.at)
            if job.attempt is None:
                self.pending.add(job, event.at)
        self.books.adopt_usage(old.usage.items())
        self.launches.version += 1
        self.version += 1
        return []

    def _released(self, event: PlacementReleased) -> list[Effect]:
        live = self._live(event, Phase.RELEASING)
        if live is None:
            return []
        job, attempt = live
        self.capacity.give(job.gang.bundle, attempt.placed)
        outcome = attempt.outcome or Outcome(Status.FAILED, "no outcome was recorded", infra=True)
        final = _verdict(job, attempt, outcome)
        if final is None:
            self._requeue(job, attempt, outcome, event.at)
        else:
            self._finish(job, event.at, final)
        self._note_idle({each.node_id for each in attempt.placed}, event.at)
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
            foreign_units=self._quarantined(event.node_id),
            cordoned=event.node_id in self.cordons,
            quarantined_units=self._quarantined(event.node_id),
            returnable=event.node_id in self.launches.returnable,
        )
        for job_id in sorted(self.books.charged_on.get(node.id, ())):
            job = self.jobs[job_id]
            assert job.attempt is not None
            for placed in job.attempt.placed:
                if placed.node_id == node.id:
                    node = charged(node, job.gang.bundle, placed.slots, +1)
        self.capacity.join(node)
        self._nodes_changed()
        self._note_cordoned(node.id, name=node.name, gone_at=None)
        self._note_idle((node.id,), event.at)
        return []

    def _node_lost(self, event: NodeLost) -> list[Effect]:
        self._note_cordoned(event.node_id, gone_at=event.at)
        self.quarantines.pop(event.node_id, None)
        # A node that went while nobody looked never came: what was charged on it is lost all the same.
        if self.capacity.leave(event.node_id) is not None:
            self.health.forget(event.node_id)
            self.idle_since.pop(event.node_id, None)
            self._nodes_changed()
        # A running job's runner tells of its own death. A lease has none: nobody else would ever end it.
        effects: list[Effect] = []
        for job_id in sorted(self.books.charged_on.get(event.node_id, ())):
            job = self.jobs[job_id]
            if (
                job.kind is Kind.LEASE
                and job.attempt
                and job.attempt.phase in (Phase.STARTING, Phase.RUNNING)
            ):
                lost = Outcome(Status.FAILED, "a node of the lease died", node_id=event.node_id, infra=True)
                effects += self._end_attempt(job, job.attempt, lost)
        return effects

    def _cordoned(self, event: NodeCordoned) -> list[Effect]:
        old = self.cordons.get(event.node_id)
        since = event.at if old is None else old.at
        name, gone_at = ("", None) if old is None else (old.name, old.gone_at)
        if event.node_id in self.capacity:
            name = self.capacity[event.node_id].name
        new = Cordon(
            event.node_id, since, event.by, event.reason, event.draining, event.deadline, name, gone_at
        )
        if new != old:
            self.cordons[event.node_id] = new
            self._cordon_changed(event.node_id)
        return []

    def _uncordoned(self, event: NodeUncordoned) -> list[Effect]:
        self.health.forget(event.node_id)
        if self.cordons.pop(event.node_id, None) is not None:
            self._cordon_changed(event.node_id)
        return []

    def _gpu_errors(self, event: GpuErrorsSeen) -> list[Effect]:
        if event.node_id in self.capacity:
            self.health.condemn(event.node_id, event.why)
            self.version += 1
        return []

    def _inherited(self, event: CordonInherited) -> list[Effect]:
        old = self.cordons.pop(event.old_id, None)
        if old is not None:
            self._cordon_changed(event.old_id)
            if event.node_id not in self.cordons:
                self.cordons[event.node_id] = replace(old, node_id=event.node_id, gone_at=None)
                self._cordon_changed(event.node_id)
        return []

    def _note_cordoned(self, node_id: str, **news: object) -> None:
        """What became of a cordoned node: kept with the cordon, which outlives it."""
        old = self.cordons.get(node_id)
        if old is not None and (new := replace(old, **news)) != old:
            self.cordons[node_id] = new
            self._cordons_changed.add(node_id)

    def _cordon_changed(self, node_id: str) -> None:
        self._cordons_changed.add(node_id)
        if node_id in self.capacity:
            self.capacity.cordon(node_id, node_id in self.cordons)
        self.books.nodes_moved()
        self.version += 1

    def _foreign(self, event: ForeignUseObserved) -> list[Effect]:
        if event.node_id in self.capacity:
            self.capacity.replace(
                replace(
                    self.capacity[event.node_id],
                    foreign_units=event.gpu_units + self._quarantined(event.node_id),
                    foreign_cpu_milli=event.cpu_milli,
                    foreign_memory_bytes=event.memory_bytes,
                )
            )
            self._note_idle((event.node_id,), event.at)
            self.books.nodes_moved()
            self.version += 1
        return []

    def _gpus_quarantined(self, event: GpusQuarantined) -> list[Effect]:
        if event.node_id not in self.capacity:
            return []
        old = self.quarantines.pop(event.node_id, None)
        if event.units:
            since = event.at if old is None else old.at
            self.quarantines[event.node_id] = Quarantine(event.node_id, since, event.units, event.strays)
        node = self.capacity[event.node_id]
        others = node.foreign_units - node.quarantined_units
        self.capacity.replace(
            replace(node, foreign_units=others + event.units, quarantined_units=event.units)
        )
        # What keeps the GPUs counts as work for Ray's autoscaler too.
        self._note_idle((event.node_id,), event.at)
        self.books.nodes_moved()
        self.version += 1
        return []

    def _quarantined(self, node_id: str) -> int:
        found = self.quarantines.get(node_id)
        return 0 if found is None else found.units

    def _node_types(self, event: NodeTypesObserved) -> list[Effect]:
        self.launches.observe_types(event.shapes, event.most_in_all, awaited=event.awaited)
        self._nodes_changed()
        return []

    def _gang_cut(self, event: GangCut) -> list[Effect]:
        job = self.jobs.get(event.job_id)
        if job is not None and job.uncut:
            self._put(replace(job, gang=event.gang, uncut=False, reason=None))
        return []

    def _launches_observed(self, event: LaunchesObserved) -> list[Effect]:
        self.launches.observe(
            dict(event.up), dict(event.booting), event.at, short=event.short, returnable=event.returnable
        )
        for node in list(self.nodes.values()):
            if node.returnable != (node.id in self.launches.returnable):
                self.capacity.mark_returnable(node.id, not node.returnable)
        self._nodes_changed()
        return []

    def _launch_failed(self, event: LaunchFailed) -> list[Effect]:
        self.launches.fail(event.node_type, event.message, event.at)
        self.version += 1
        return []

    def _note_idle(self, node_ids: Iterable[str], now: float) -> None:
        """Something has changed on these nodes: who is idle still has been since it was."""
        for node_id in node_ids:
            if self._idle(node_id):
                self.idle_since.setdefault(node_id, now)
            else:
                self.idle_since.pop(node_id, None)

    def _idle(self, node_id: str) -> bool:
        if node_id not in self.capacity or self.books.charged_on.get(node_id):
            return False
        return not self.capacity[node_id].foreign_units

    def _nodes_changed(self) -> None:
        self.books.quota.resize(self._gpus_by_type())
        self.books.nodes_moved()
        self.version += 1

    # --- the moves that rules share ------------------------------------------------------------------------

    def _live(
        self,
        event: PlacementReady
        | ReserveFailed
        | RunStarted
        | RunExited
        | RunLost
        | PlacementReleased
        | CheckpointReported,
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

    def _note_failure(self, job: Job, attempt: Attempt, node_id: str | None, why: str) -> None:
        """A node did this to the attempt. What was told to stop may well be gone for that."""
        if node_id is not None and attempt.stop is None and node_id in self.capacity:
            self.health.note(node_id, Failure(self._now, job.id, attempt.number, why))

    def _end_attempt(self, job: Job, attempt: Attempt, outcome: Outcome) -> list[Effect]:
        ended = replace(attempt, phase=Phase.RELEASING, outcome=outcome)
        self._put(replace(job, status=Status.STOPPING, attempt=ended))
        return [Release(job.id, attempt.number, job.gang.sized(len(attempt.placed)), attempt.placed)]

    def _requeue(self, job: Job, attempt: Attempt, outcome: Outcome, now: float) -> None:
        evicted = attempt.stop is not None and attempt.stop.comes_back
        infra = job.infra_failures + (outcome.infra and not evicted)
        failed = outcome.status is Status.FAILED and not outcome.infra and not evicted
        calm = failed or evicted
        delay = 0.0 if calm else min(INFRA_BACKOFF_MOST_S, INFRA_BACKOFF_S * 2 ** max(0, infra - 1))
        kept_s = 0.0
        if attempt.started_at is not None and attempt.checkpoint_at is not None:
            kept_s = max(0.0, attempt.checkpoint_at - attempt.started_at)
        queued = replace(
            job,
            status=Status.QUEUED,
            attempt=None,
            infra_failures=infra,
            failures=job.failures + failed,
            evictions=job.evictions + evicted,
            ran_s=job.ran_s + kept_s,
            eligible_at=now + delay if delay else 0.0,
            queued_at=now,
            outcome=replace(outcome, message=_evicted(attempt), infra=False) if evicted else outcome,
        )
        self._put(queued)

    def _finish(self, job: Job, now: float, outcome: Outcome) -> None:
        """End the job, and with it the jobs that can now never start."""
        ending = [(job, outcome)]
        while ending:
            job, outcome = ending.pop()
            self._finish_one(job, now, outcome)
            for other in sorted(self.books.dependents.get(job.id, ())):
                dependent = self.jobs[other]
                if outcome.status is Status.SUCCEEDED:
                    left = tuple(each for each in dependent.after if each != job.id)
                    self._put(replace(dependent, after=left, reason=None))
                elif all(dependent is not each for each, _ in ending):
                    why = f"{job.id}, which had to succeed first, ended {outcome.status}"
                    ending.append((dependent, Outcome(Status.CANCELLED, why)))

    def _finish_one(self, job: Job, now: float, outcome: Outcome) -> None:
        ended = replace(job, status=outcome.status, attempt=None, outcome=outcome, ended_at=now, reason=None)
        if job.attempt is not None and job.attempt.started_at is not None and not outcome.infra:
            self._learn(job, job.ran_s + now - job.attempt.started_at)
        if job.attempt is None:
            self.pending.remove(job)
        self.books.changed(job, None, now)
        self._note_usage(job)
        self._changed[job.id] = ended
        self.version += 1
        del self.jobs[job.id]
        self.uncut.pop(job.id, None)
        self._story.pop(job.id, None)

    def _learn(self, job: Job, ran_s: float) -> None:
        """A job has ended after so much run time, however it ended: it held its GPUs for as long."""
        if not self.learns:
            return
        self.predictor.learn(job, ran_s)
        self.remaining.learn(job, ran_s)

    def _put(self, job: Job, *, moved: bool = True) -> None:
        """Replace a record. `moved=False`: nothing but its reason has changed."""
        old = self.jobs.get(job.id)
        self.jobs[job.id] = job
        self._changed[job.id] = job
        self.version += 1
        self.books.changed(old, job, self._now)
        if not moved:
            return
        if old is not None and old.attempt is None:
            self.pending.remove(old)
        if job.attempt is None:
            self.pending.add(job, self._now)
        if job.uncut:
            self.uncut[job.id] = None
        else:
            self.uncut.pop(job.id, None)
        self._note_usage(job)

    def _note_usage(self, job: Job) -> None:
        if job.queue in self.policy.queues and (job.queue, job.owner) in self.books.usage:
            self._usage_changed.add((job.queue, job.owner))

    def _gpus_by_type(self) -> dict[str, int]:
        """Units that the cluster has, or would have with all that can be launched."""
        units = self.capacity.by_type()
        for shape in self.launchable:
            name = shape.gpu_type or ""
            units[name] = units.get(name, 0) + shape.gpu_slots * shape.most * GPU_UNIT
        return units

    def _invalid(self, job: Job, event: Event) -> InvalidTransition:
        phase = job.attempt.phase if job.attempt else job.status
        return InvalidTransition(
            f"{type(event).__name__} is not allowed for {job.id} in {phase}",
            job=job.id,
            state=str(phase),
            event=repr(event),
            story=[f"{at:.3f} {kind.__name__}" for at, kind in self._story.get(job.id, ())],
        )

    # --- self-check --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every invariant of this module, recomputed from scratch. Raises InternalError. Run in tests."""
        self.capacity.check()
        cordoned = {node.id for node in self.nodes.values() if node.cordoned}
        _require(cordoned == self.cordons.keys() & self.nodes.keys(), f"cordoned are {cordoned}")
        kept = {node.id: node.quarantined_units for node in self.nodes.values() if node.quarantined_units}
        _require(
            kept == {each.node_id: each.units for each in self.quarantines.values()},
            f"quarantined are {kept}",
        )
        returnable = {node.id for node in self.nodes.values() if node.returnable}
        _require(returnable == self.launches.returnable & self.nodes.keys(), f"returnable are {returnable}")
        idle = {node_id for node_id in self.nodes if self._idle(node_id)}
        _require(self.idle_since.keys() == idle, f"idle are {idle}, and not {set(self.idle_since)}")
        nodes = {
            node.id: replace(
                node,
                devices=Devices.whole(node.gpu_slots),
                cpu_free_milli=node.cpu_milli,
                memory_free_bytes=node.memory_bytes,
            )
            for node in self.nodes.values()
        }
        books = Books(self.policy, self._gpus_by_type(), self.predictor)
        for job in self.jobs.values():
            _require(not job.status.terminal, f"{job.id} has ended and is still here")
            _require((job.attempt is None) == (job.status is Status.QUEUED), f"{job.id}: {job.status}")
            _require((job.attempt is None) == (job.id in self.pending), f"{job.id}: pending or not")
            _require(all(other in self.jobs for other in job.after), f"{job.id} waits for the dead")
            books.changed(None, job, 0.0)
            if job.attempt is None:
                continue
            placed = job.attempt.placed
            _require(
                job.gang.minimum <= len(placed) <= job.gang.count, f"{job.id}: a gang is whole or absent"
            )
            _require(job.attempt.number == job.attempts, f"{job.id}: attempt numbers")
            for each in placed:
                if each.node_id in nodes:
                    nodes[each.node_id] = charged(nodes[each.node_id], job.gang.bundle, each.slots, +1)
        _require(nodes == dict(self.nodes), "the nodes' free amounts are not capacity minus live attempts")
        for name in ("charged_on", "deadlines", "ending", "dependents", "evictable", "elastic", "runs"):
            ours, fresh = getattr(self.books, name), getattr(books, name)
            _require(ours == fresh, f"{name} is {ours}, the records say {fresh}")
        _require(set(self.books.unchecked) == set(books.unchecked), "who was looked at")
        _require(
            [e[1:] for e in self.books.ends] == [e[1:] for e in books.ends] or self.policy.predicted_limits,
            f"ends {self.books.ends} are not {books.ends}",
        )
        _require(
            self.books.quota.usages() == books.quota.usages(), "quota in use is not what the attempts hold"
        )
        held = {owner: usage.current for owner, usage in self.books.usage.items() if usage.current}
        fresh_held = {owner: usage.current for owner, usage in books.usage.items() if usage.current}
        _require(held == fresh_held, f"owners hold {held}, the attempts say {fresh_held}")
        self.pending.check(self.jobs)
        _require(self.uncut.keys() == {job.id for job in self.jobs.values() if job.uncut}, "who is to be cut")


def _resume(job: Job, attempt: Attempt) -> list[Effect]:
    """The effect that was under way for a live attempt when the allocator stopped."""
    effects: list[Effect]
    gang = job.gang.sized(len(attempt.placed))
    match attempt.phase:
        case Phase.RESERVING:
            effects = [Reserve(job.id, attempt.number, gang, attempt.placed)]
        case Phase.STARTING | Phase.RUNNING:
            begun = attempt.phase is Phase.RUNNING
            run = Run(
                job.id, attempt.number, job.kind, gang, attempt.placed, job.grace_s, job.array_index, begun
            )
            effects = [run]
        case Phase.RELEASING:
            return [Release(job.id, attempt.number, gang, attempt.placed)]
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


def _evicted(attempt: Attempt) -> str:
    if attempt.stop is StopCause.RESIZED:
        return f"stopped to go on with fewer GPUs: {attempt.stop_by} comes first"
    if attempt.stop is StopCause.DRAINED:
        return f"stopped to go on elsewhere: {attempt.stop_by} is drained"
    return f"evicted for {attempt.stop_by}"


def _stopped_while_queued(event: StopRequested) -> Outcome:
    status, message = _STOPPED[event.cause]
    by = f" by {event.by}" if event.by else ""
    return Outcome(status, f"{message}{by} while it was queued")


def _verdict(job: Job, attempt: Attempt, outcome: Outcome) -> Outcome | None:
    """The job's end, or None where it is to be tried again. First match wins."""
    if attempt.stop is not None and attempt.stop.comes_back:
        # What ended by itself before the signal reached it has ended: nobody needs it again.
        return outcome if outcome.status is Status.SUCCEEDED and job.kind is not Kind.LEASE else None
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
    HoldChanged: ClusterState._hold_changed,
    CheckpointReported: ClusterState._checkpoint,
    PolicyChanged: ClusterState._policy_changed,
    PlacementReleased: ClusterState._released,
    NodeJoined: ClusterState._node_joined,
    NodeLost: ClusterState._node_lost,
    NodeCordoned: ClusterState._cordoned,
    NodeUncordoned: ClusterState._uncordoned,
    CordonInherited: ClusterState._inherited,
    GpuErrorsSeen: ClusterState._gpu_errors,
    GpusQuarantined: ClusterState._gpus_quarantined,
    ForeignUseObserved: ClusterState._foreign,
    NodeTypesObserved: ClusterState._node_types,
    GangCut: ClusterState._gang_cut,
    LaunchesObserved: ClusterState._launches_observed,
    LaunchFailed: ClusterState._launch_failed,
}
