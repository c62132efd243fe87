"""`shortest_first`: stop a job that will still need long, so that one that will soon be done can run.

A waiting job p may take the place of running jobs v where that clearly pays. With r the rank of a job in seconds
(`gittins`), g its GPUs and `cost` what stopping it throws away (its restart, and the work since its checkpoint):

    r_v·g_v > GAIN · (r_p·g_p + cost_v·g_v)    for each victim, and    GAIN · Σ 1/r_v ≤ 1/r_p    for all together

Only right after a checkpoint, only after a first stretch of run time, and never a gang of several nodes, whose
places are hard to find again. Nobody waits for ever: a job that has waited for `max_age` comes first whatever its
rank, may stop others without the test above, and is then left alone for a while; but never so many at a time that
they are all that runs. The numbers below were chosen on a replay of three public traces and checked on others
(docs/scheduling.md has the table); the outcome depends little on them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rm.core.backfill import Reservation, class_ids
from rm.core.capacity import NodeClass, copies_in, usable
from rm.core.model import Attempt, Job, Node, StopCause
from rm.core.preemption import AT_ONCE_S, Eviction
from rm.core.resources import GPU_UNIT, Amount, Bundle, Devices
from rm.core.state import ClusterState

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


@dataclass(frozen=True, slots=True)
class _Victim:
    job: Job
    rank_s: float
    cost_s: float
    gpus: float
    held: Amount

    @property
    def score(self) -> float:
        return self.rank_s * self.gpus


@dataclass(frozen=True, slots=True)
class _Claim:
    """A waiting job. `aged`: it has waited for `max_age`."""

    job: Job
    rank_s: float
    gpus: float
    aged: bool


class Outlast:
    """The running jobs that one cycle may stop, by node."""

    def __init__(self, state: ClusterState, now: float) -> None:
        self._state = state
        self._now = now
        self._guarded_units = 0
        candidates: list[tuple[Job, Attempt, float]] = []
        for job_id in state.books.charged_jobs():
            job = state.jobs[job_id]
            assert job.attempt is not None
            if waited_long(job, job.attempt.admitted_at, state) and now < job.attempt.admitted_at + GUARD_S:
                self._guarded_units += job.held_units
            elif self._may_be_stopped(job, job.attempt):
                since = max(job.attempt.started_at or 0.0, job.attempt.checkpoint_at or 0.0)
                candidates.append((job, job.attempt, now - since))
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
            ran_s = self._now - (attempt.started_at or self._now)
            rank_s = self._state.remaining.rank(job, job.ran_s + ran_s)
            held = Amount.of(job.gang.bundle, len(attempt.placed))
            victim = _Victim(job, rank_s, RESTART_S + lost_s, held.gpu_units / GPU_UNIT, held)
            by_node.setdefault(attempt.placed[0].node_id, []).append(victim)
        for victims in by_node.values():
            victims.sort(key=lambda each: -each.score)
        return by_node

    def evict(
        self, job: Job, classes: Sequence[NodeClass], owed: Mapping[str, Amount], stopped: Collection[str]
    ) -> Eviction | None:
        """The cheapest victims for `job`, or None where stopping anybody does not pay."""
        aged = waited_long(job, self._now, self._state)
        if aged and self._guarded_units > MOST_GUARDED * self._state.totals().capacity:
            return None
        if job.gang.bundle.gpu_units < GPU_UNIT:
            return None
        mine = _Claim(job, rank_waiting(job, self._state), job.gang.gpu_units / GPU_UNIT, aged)
        if job.gang.minimum == 1:
            return self._on_one_node(mine, classes, owed, stopped)
        return self._on_whole_nodes(mine, classes, owed, stopped)

    def _on_one_node(
        self, mine: _Claim, classes: Sequence[NodeClass], owed: Mapping[str, Amount], stopped: Collection[str]
    ) -> Eviction | None:
        job = mine.job
        capacity, bundle = self._state.capacity, job.gang.bundle
        ids = class_ids(classes)
        best: tuple[float, str, list[_Victim]] | None = None
        for node_id, victims in self._victims(mine.aged).items():
            if node_id not in capacity or id(capacity.class_of(node_id)) not in ids:
                continue
            node = capacity[node_id]
            if node.gpu_slots * GPU_UNIT < bundle.gpu_units:
                continue
            free = _free(node, usable(node))
            if node_id in owed:
                free -= owed[node_id]
            chosen: list[_Victim] = []
            for each in victims:
                if free.holds(bundle):
                    break
                if each.job.id not in stopped and self._may_stop(mine, each):
                    chosen.append(each)
                    free += each.held
            if not free.holds(bundle):
                continue
            for each in list(reversed(chosen)):
                if (free - each.held).holds(bundle):
                    chosen.remove(each)
                    free -= each.held
            cost = sum(each.cost_s * each.gpus for each in chosen)
            if (best is None or cost < best[0]) and _pays(mine, chosen):
                best = cost, node_id, chosen
        if best is None or not best[2]:
            return None
        return self._eviction(job, classes, {best[1]: Amount.of(bundle)}, best[2])

    def _on_whole_nodes(
        self, mine: _Claim, classes: Sequence[NodeClass], owed: Mapping[str, Amount], stopped: Collection[str]
    ) -> Eviction | None:
        """A gang of several nodes: those that are cheapest to empty."""
        job, by_node = mine.job, self._victims(mine.aged)
        capacity = self._state.capacity
        offers: list[tuple[float, int, str, list[_Victim]]] = []
        bundle = job.gang.bundle
        plain = not bundle.cpu_milli and not bundle.memory_bytes
        for group in classes:
            per_node = group.key.gpu_slots * GPU_UNIT // bundle.gpu_units
            if not per_node:
                continue
            for free, bucket in enumerate(group.whole):
                for number in bucket:
                    node = capacity.node_numbered(number)
                    if node.id in owed:
                        continue
                    fits = per_node if plain else _copies_when_empty(node, bundle)
                    if not fits:
                        continue
                    if free == group.key.gpu_slots:
                        offers.append((0.0, fits, node.id, []))
                        continue
                    here = [
                        each
                        for each in by_node.get(node.id, ())
                        if each.job.id not in stopped and self._may_stop(mine, each)
                    ]
                    freed = sum(each.job.held_units for each in here)
                    if free * GPU_UNIT + freed >= group.key.gpu_slots * GPU_UNIT:
                        offers.append((sum(each.cost_s * each.gpus for each in here), fits, node.id, here))
        offers.sort(key=lambda each: (each[0], each[2]))
        need: dict[str, Amount] = {}
        chosen: list[_Victim] = []
        missing = job.gang.minimum
        for _, fits, node_id, victims in offers:
            if missing <= 0:
                break
            here_count = min(missing, fits)
            need[node_id] = Amount.of(bundle, here_count)
            chosen += victims
            missing -= here_count
        if missing > 0 or not chosen or not _pays(mine, chosen):
            return None
        return self._eviction(job, classes, need, chosen)

    def _may_stop(self, mine: _Claim, victim: _Victim) -> bool:
        state, other = self._state, victim.job
        if other.priority > mine.job.priority:
            return False
        if state.books.quota.limited and other.queue != mine.job.queue:
            assert other.attempt is not None
            if not state.books.quota.borrows(other.queue, state.books.kind(other.attempt)):
                return False
        return mine.aged or victim.score > GAIN * (mine.rank_s * mine.gpus + victim.cost_s * victim.gpus)

    def _may_be_stopped(self, job: Job, attempt: Attempt) -> bool:
        """Whether anybody may stop it now."""
        started = attempt.started_at
        if started is None or not job.preemptible or len({each.node_id for each in attempt.placed}) > 1:
            return False
        spare_s = max(FIRST_STRETCH_S, job.min_runtime_s, self._state.policy.min_runtime_s)
        return self._now - started >= spare_s and self._now >= attempt.admitted_at + AT_ONCE_S

    def _eviction(
        self, job: Job, classes: Sequence[NodeClass], need: dict[str, Amount], victims: list[_Victim]
    ) -> Eviction:
        ids = tuple(each.job.id for each in victims)
        gone = {*ids, *self._state.books.ending}
        counted = frozenset((each, self._state.jobs[each].attempts) for each in gone)
        reservation = Reservation(job.id, self._now, need, class_ids(classes), counted, ids)
        return Eviction(reservation, tuple((each, StopCause.PREEMPTED) for each in ids))


def _free(node: Node, devices: Devices) -> Amount:
    """What whole devices, CPUs and memory are free on the node."""
    return Amount(
        devices.free.count(GPU_UNIT) * GPU_UNIT,
        node.cpu_free_milli - node.foreign_cpu_milli,
        node.memory_free_bytes - node.foreign_memory_bytes,
    )


def _copies_when_empty(node: Node, bundle: Bundle) -> int:
    """How many bundles fit on the node beside what strangers have there."""
    devices = Devices.whole(node.gpu_slots)
    return copies_in(
        bundle,
        devices,
        node.cpu_milli - node.foreign_cpu_milli,
        node.memory_bytes - node.foreign_memory_bytes,
    )


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
