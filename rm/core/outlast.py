"""`shortest_first`: stop a job that will still need long, so that one that will soon be done can run.

A waiting job p may take the place of running jobs v where that clearly pays. With r the rank of a job in seconds
(`gittins`), g its GPUs and `cost` what stopping it throws away (its restart, and the work since its checkpoint):

    r_v·g_v > GAIN · (r_p·g_p + cost_v·g_v)    for each victim, and    GAIN · Σ 1/r_v ≤ 1/r_p    for all together

Only right after a checkpoint, only after a first stretch of run time, and never a gang of several nodes, whose
places are hard to find again; nor what could not come back, because its queue is gone or stopped. Only where p has
quota and place then, and of other queues only what they borrow. Nobody waits for ever: a job that has waited for
`max_age` comes first whatever its rank, may stop others without the test above, and is then left alone for a while;
but never so many at a time that they are all that runs. The numbers below were chosen on a replay of three public
traces and checked on others (docs/scheduling.md has the table); the outcome depends little on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rm.core.backfill import Fresh
from rm.core.capacity import NodeClass, copies_in, usable
from rm.core.model import Attempt, Gang, Job, Node, StopCause, Strategy
from rm.core.preemption import AT_ONCE_S, Eviction
from rm.core.relief import Relief
from rm.core.reservations import Promised, Reservation, class_ids, coming, needs
from rm.core.resources import GPU_UNIT, NOTHING, Amount, Devices
from rm.core.state import ClusterState
from rm.core.transit import attempt_of

GAIN = 8.0
RESTART_S = 60.0
"""What a restart is taken to cost."""
FIRST_STRETCH_S = 600.0
"""How long an attempt runs undisturbed at least."""
MOST_LOST_S = 120.0
"""Work since the last checkpoint beyond which an attempt is left alone."""
GUARD_S = 7_200.0
"""How long a job that had waited for `max_age` runs undisturbed."""
MOST_GUARDED = 0.2
"""Share of the cluster's GPUs beyond which guarded jobs stop nobody."""
LOOK_AGAIN_S = 60.0
"""Ranks change with time alone: how often they are compared while somebody waits."""
MOST_TRIED = 8
"""Nodes, the cheapest first, on which a job that fits by its GPUs is really placed."""


@dataclass(frozen=True, slots=True)
class _Victim:
    job: Job
    attempt: Attempt
    rank_s: float
    cost_s: float
    gpus: float
    held: Amount

    @property
    def score(self) -> float:
        return self.rank_s * self.gpus


@dataclass(frozen=True, slots=True)
class _Claim:
    """A waiting job. `aged`: it has waited for `max_age`. `kind`: of the GPUs whose quota it would use.

    `classes`: where it may run. `promised`: what it must leave to others; `coming`: what it may count on.
    """

    job: Job
    kind: str
    classes: Sequence[NodeClass]
    promised: Promised
    coming: tuple[Job, ...]
    rank_s: float
    gpus: float
    aged: bool


class Outlast:
    """The running jobs that one cycle may stop, by node."""

    def __init__(self, state: ClusterState, now: float) -> None:
        self._state = state
        self._now = now
        self._guarded: dict[str, int] = {}
        """Jobs that had waited for `max_age` → units that they hold, or that are on the way back for them."""
        candidates: list[tuple[Job, Attempt, float]] = []
        for job_id in state.books.charged_jobs():
            job = state.jobs[job_id]
            attempt = attempt_of(job)
            if waited_long(job, attempt.admitted_at, state) and now < attempt.admitted_at + GUARD_S:
                self._guarded[job_id] = job.held_units
            elif self._may_be_stopped(job, attempt):
                since = max(attempt.started_at or 0.0, attempt.checkpoint_at or 0.0)
                candidates.append((job, attempt, now - since))
        waiting = (
            state.jobs.get(by) for by in {attempt_of(state.jobs[each]).stop_by for each in state.books.ending}
        )
        for each in waiting:
            if each is not None and each.attempt is None and waited_long(each, now, state):
                self._guarded[each.id] = each.gang.least_units
        self._candidates = candidates
        self._just_saved = self._ranked(each for each in candidates if each[2] <= MOST_LOST_S)
        self._any: dict[str, list[_Victim]] | None = None

    def _victims(self, aged: bool) -> dict[str, list[_Victim]]:
        """By node, the longest to go first. Without `aged` only those that have just saved their work."""
        if not aged:
            return self._just_saved
        if self._any is None:
            self._any = self._ranked(self._candidates)
        return self._any

    def _ranked(self, candidates: Iterable[tuple[Job, Attempt, float]]) -> dict[str, list[_Victim]]:
        by_node: dict[str, list[_Victim]] = {}
        for job, attempt, lost_s in candidates:
            assert attempt.started_at is not None
            ran_s = self._now - attempt.started_at
            rank_s = self._state.remaining.rank(job, job.ran_s + ran_s)
            held = Amount.of(job.gang.bundle, len(attempt.placed))
            victim = _Victim(job, attempt, rank_s, RESTART_S + lost_s, held.gpu_units / GPU_UNIT, held)
            by_node.setdefault(attempt.placed[0].node_id, []).append(victim)
        for victims in by_node.values():
            victims.sort(key=lambda each: -each.score)
        return by_node

    def evict(
        self, job: Job, kind: str, classes: Sequence[NodeClass], promised: Promised, fresh: Fresh
    ) -> Eviction | None:
        """The cheapest victims for `job`, or None where stopping anybody does not pay.

        `fresh`: what the cycle has admitted.
        """
        aged = waited_long(job, self._now, self._state)
        if aged and self._too_many_guarded(fresh):
            return None
        if job.gang.bundle.gpu_units < GPU_UNIT:
            return None
        mine = _Claim(
            job, kind, classes, promised, tuple(coming(self._state, job.id, promised)),
            rank_waiting(job, self._state), job.gang.gpu_units / GPU_UNIT, aged,
        )  # fmt: skip
        eviction = self._on_one_node(mine) if job.gang.minimum == 1 else self._on_whole_nodes(mine)
        if aged and eviction is not None:
            self._guarded[job.id] = job.gang.least_units
        return eviction

    def _too_many_guarded(self, fresh: Fresh) -> bool:
        for _, job, attempt in fresh:
            if waited_long(job, self._now, self._state):
                self._guarded[job.id] = len(attempt.placed) * job.gang.bundle.gpu_units
        return sum(self._guarded.values()) > MOST_GUARDED * self._state.totals().capacity

    def _on_one_node(self, mine: _Claim) -> Eviction | None:
        capacity, bundle = self._state.capacity, mine.job.gang.bundle
        ids, on_their_way = class_ids(mine.classes), _by_node(mine.coming)
        offers: list[tuple[float, list[_Victim]]] = []
        for node_id, victims in self._victims(mine.aged).items():
            if node_id not in capacity or id(capacity.class_of(node_id)) not in ids:
                continue
            node = capacity[node_id]
            if not _copies(mine.job.gang, node):
                continue
            free = _free(node) + on_their_way.get(node_id, NOTHING) - mine.promised.owed.get(node_id, NOTHING)
            chosen: list[_Victim] = []
            for each in victims:
                if free.holds(bundle):
                    break
                if self._may_stop(mine, each):
                    chosen.append(each)
                    free += each.held
            if not free.holds(bundle):
                continue
            for each in list(reversed(chosen)):
                if (free - each.held).holds(bundle):
                    chosen.remove(each)
                    free -= each.held
            if chosen and _pays(mine, chosen):
                offers.append((sum(each.cost_s * each.gpus for each in chosen), chosen))
        offers.sort(key=lambda each: each[0])
        for _, chosen in offers[:MOST_TRIED]:
            eviction = self._eviction(mine, chosen)
            if eviction is not None:
                return eviction
        return None

    def _on_whole_nodes(self, mine: _Claim) -> Eviction | None:
        """A gang of several nodes: those that are cheapest to empty."""
        job, by_node = mine.job, self._victims(mine.aged)
        capacity, on_their_way = self._state.capacity, _by_node(mine.coming)
        offers: list[tuple[float, int, str, list[_Victim]]] = []
        for group in mine.classes:
            for free, bucket in enumerate(group.whole):
                for number in bucket:
                    node = capacity.node_numbered(number)
                    per_node = _copies(job.gang, node)
                    if not per_node or mine.promised.owed.get(node.id):
                        continue
                    if free == group.key.gpu_slots:
                        offers.append((0.0, per_node, node.id, []))
                        continue
                    here = [each for each in by_node.get(node.id, ()) if self._may_stop(mine, each)]
                    freed = on_their_way.get(node.id, NOTHING).gpu_units + sum(
                        each.held.gpu_units for each in here
                    )
                    if free * GPU_UNIT + freed >= group.key.gpu_slots * GPU_UNIT:
                        offers.append(
                            (sum(each.cost_s * each.gpus for each in here), per_node, node.id, here)
                        )
        offers.sort(key=lambda each: (each[0], each[2]))
        chosen: list[_Victim] = []
        missing = job.gang.minimum
        for _, per_node, _, victims in offers:
            if missing <= 0:
                break
            chosen += victims
            missing -= per_node
        if missing > 0 or not chosen or not _pays(mine, chosen):
            return None
        return self._eviction(mine, chosen)

    def _eviction(self, mine: _Claim, victims: list[_Victim]) -> Eviction | None:
        """Stop these, but for those that need not go; None where the job could not start even so.

        Asked is what is asked at a start: its quota, and a place by all that it needs.
        """
        books, quota, job = self._state.books, self._state.books.quota, mine.job
        relief = Relief(job.gang, self._state.capacity, mine.classes, mine.promised.owed)
        charged: list[tuple[str, str, int]] = []

        def move(other: Job, sign: int) -> None:
            attempt = attempt_of(other)
            (relief.take if sign > 0 else relief.give)(other.gang.bundle, attempt)
            if other.queue in self._state.policy.queues:
                entry = other.queue, books.kind(attempt), sign * other.held_units
                quota.add(*entry)
                charged.append(entry)

        def enough() -> bool:
            return (
                quota.available(job.queue, mine.kind) >= job.gang.least_units and relief.places() is not None
            )

        with quota.tried(charged):
            for other in mine.coming:
                move(other, -1)
            for each in victims:
                if not self._lends(mine, each):
                    return None  # the victims before it have brought its queue back to what it owns
                move(each.job, -1)
            if not enough():
                return None
            chosen = list(victims)
            for each in reversed(victims):
                move(each.job, +1)
                if enough():
                    chosen.remove(each)
                else:
                    move(each.job, -1)
            places = relief.places()
        if places is None or not chosen:
            return None
        ids = tuple(each.job.id for each in chosen)
        gone = {*ids, *books.ending}
        counted = frozenset((each, self._state.jobs[each].attempts) for each in gone)
        reservation = Reservation(
            job.id, self._now, needs(job.gang.bundle, places), class_ids(mine.classes), counted, ids
        )
        return Eviction(reservation, tuple((each, StopCause.PREEMPTED) for each in ids))

    def _may_stop(self, mine: _Claim, victim: _Victim) -> bool:
        if victim.job.id in mine.promised.stopped or victim.job.priority > mine.job.priority:
            return False
        if not self._lends(mine, victim):
            return False
        return mine.aged or victim.score > GAIN * (mine.rank_s * mine.gpus + victim.cost_s * victim.gpus)

    def _lends(self, mine: _Claim, victim: _Victim) -> bool:
        """Whether the victim's queue is the job's own, or uses more than it owns."""
        books, queue = self._state.books, victim.job.queue
        return (
            queue == mine.job.queue
            or not books.quota.limited
            or books.quota.borrows(queue, books.kind(victim.attempt))
        )

    def _may_be_stopped(self, job: Job, attempt: Attempt) -> bool:
        """Whether anybody may stop it now."""
        started, rules = attempt.started_at, self._state.policy.queues.get(job.queue)
        if rules is None or rules.stopped:
            return False
        if started is None or not job.preemptible or len({each.node_id for each in attempt.placed}) > 1:
            return False
        spare_s = max(FIRST_STRETCH_S, job.min_runtime_s, self._state.policy.min_runtime_s)
        return self._now - started >= spare_s and self._now >= attempt.admitted_at + AT_ONCE_S


def _copies(gang: Gang, node: Node) -> int:
    """How many of the gang's bundles the node would take, were it empty; 0 where a whole gang must fit and does not."""
    if node.cordoned:
        return 0
    copies = copies_in(
        gang.bundle,
        Devices.whole(node.gpu_slots),
        node.cpu_milli - node.foreign_cpu_milli,
        node.memory_bytes - node.foreign_memory_bytes,
    )
    if gang.strategy is Strategy.STRICT_SPREAD:
        return min(1, copies)
    return 0 if gang.strategy is Strategy.STRICT_PACK and copies < gang.minimum else copies


def _free(node: Node) -> Amount:
    """What whole devices, CPUs and memory are free on the node."""
    return Amount(
        usable(node).free.count(GPU_UNIT) * GPU_UNIT,
        node.cpu_free_milli - node.foreign_cpu_milli,
        node.memory_free_bytes - node.foreign_memory_bytes,
    )


def _by_node(jobs: Iterable[Job]) -> dict[str, Amount]:
    """What these jobs hold on each node."""
    held: dict[str, Amount] = {}
    for job in jobs:
        one = Amount.of(job.gang.bundle)
        for each in attempt_of(job).placed:
            held[each.node_id] = held.get(each.node_id, NOTHING) + one
    return held


def _pays(mine: _Claim, victims: list[_Victim]) -> bool:
    """Whether all victims together are worth it."""
    return mine.aged or GAIN * sum(1.0 / each.rank_s for each in victims) <= 1.0 / mine.rank_s


def rank_waiting(job: Job, state: ClusterState) -> float:
    """The rank of a job that does not run: where it ran before it also has to start again."""
    again_s = RESTART_S if job.evictions else 0.0
    return state.remaining.rank(job, job.ran_s) + again_s


def waited_long(job: Job, until: float, state: ClusterState) -> bool:
    """Whether the job had waited for `max_age` at this time since it last ran."""
    return until - (job.queued_at or job.submitted_at) >= state.policy.max_age_s
