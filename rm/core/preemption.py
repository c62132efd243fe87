"""Who has to go so that somebody with a better right can start.

Two rights. *Inside a queue* a higher priority may evict a lower one, where the queue says `preempt: lower`.
*Between queues* a job that fits its queue's nominal quota may take back what other queues borrow (`reclaim`).
Never evicted: a job that is not preemptible, one that has not run for its `min_runtime`, one whose queue does not
borrow (for reclaim), and for a priority one whose age would lift it to that. So a victim can never take the place
back: it has a lower priority, or no quota to claim.

Order of victims: jobs of borrowing queues first, then the lowest priority, then the least loss (GPUs × seconds
since the last checkpoint). They are added until the gang fits; then, from the last to the first, each one that is
not needed is spared. An elastic gang is first taken back to its minimum, before anybody is evicted.

Sources: Kueue, `pkg/scheduler/preemption`; scheduling.md of this project's design.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from rm.core.backfill import Promised, Reservation, class_ids, coming, needs
from rm.core.capacity import NodeClass
from rm.core.fairshare import soon
from rm.core.model import Attempt, Job, Phase, StopCause
from rm.core.pending import ONE_NAME
from rm.core.policy import ANY, Order, Preempt, Reclaim
from rm.core.records import replace
from rm.core.relief import Relief
from rm.core.resources import GPU_UNIT
from rm.core.state import ClusterState

MOST_CANDIDATES = 5_000
"""Attempts considered for one preemptor; beyond that only the cheapest are looked at."""
AT_ONCE_S = 1.0
"""What has only just been admitted is left alone for this long: no decision is taken back in the same breath."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """Whom to stop for `reservation.job_id`, and the places that this gives."""

    reservation: Reservation
    victims: tuple[tuple[str, StopCause], ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One way to get GPUs back: an elastic gang's bundles above its minimum (`shrink`), or all that is left."""

    job: Job
    part: Attempt
    """The live attempt with only the bundles that this way gives back."""
    borrowing: bool
    shrink: bool

    @property
    def units(self) -> int:
        return len(self.part.placed) * self.job.gang.bundle.gpu_units

    def rank(self, now: float) -> tuple[int, int, int, float, int]:
        return (not self.shrink, not self.borrowing, self.job.priority, loss(self.job, now), -self.job.seq)


def loss(job: Job, now: float) -> float:
    """GPU-seconds that stopping the job now throws away."""
    attempt = job.attempt
    if attempt is None or attempt.started_at is None:
        return 0.0
    since = max(attempt.started_at, attempt.checkpoint_at or attempt.started_at)
    return max(0.0, now - since) * job.held_units / GPU_UNIT


def in_transit(
    job: Job, kind: str, state: ClusterState, classes: Sequence[NodeClass], promised: Promised, now: float
) -> Reservation | None:
    """The reservation of what is on its way back already, GPUs and quota, where that is enough for `job`."""
    if not state.books.ending and not promised.stopped:
        return None
    quota, units = state.books.quota, job.gang.minimum * job.gang.bundle.gpu_units
    back = list(coming(state, job.id, promised))
    short = quota.available(job.queue, kind) < units
    charged = _quota_back(state, back)
    for entry in charged:
        quota.add(*entry)
    enough = quota.available(job.queue, kind) >= units
    for queue, of_kind, change in reversed(charged):
        quota.add(queue, of_kind, -change)
    if not enough:
        return None
    relief = Relief(job.gang, state.capacity, classes, promised.owed)
    met = [each for each in back if relief.give(each.gang.bundle, _attempt(each))]
    places = relief.places() if met or short else None
    if places is None:
        return None
    evicted = tuple(each.id for each in back if _attempt(each).stop_by == job.id)
    counted = frozenset((each.id, each.attempts) for each in (back if short else met))
    return Reservation(job.id, now, needs(job, places), class_ids(classes), counted, evicted)


def evict(
    job: Job,
    kind: str,
    state: ClusterState,
    classes: Sequence[NodeClass],
    promised: Promised,
    now: float,
    wake: Callable[[float], None],
) -> Eviction | None:
    """The victims whose GPUs and quota let `job` start, or None where no set of victims would.

    `wake(at)` is told when somebody who is protected by `min_runtime` now could be evicted.
    """
    quota, units = state.books.quota, job.gang.minimum * job.gang.bundle.gpu_units
    relief = Relief(job.gang, state.capacity, classes, promised.owed)
    on_their_way = list(coming(state, job.id, promised))
    for other in on_their_way:
        relief.give(other.gang.bundle, _attempt(other))
    charged: list[tuple[str, str, int]] = []

    def charge(candidate: _Candidate, sign: int) -> None:
        entry = candidate.job.queue, state.books.kind(candidate.part), sign * candidate.units
        quota.add(*entry)
        charged.append(entry)

    def enough() -> bool:
        return quota.available(job.queue, kind) >= units and relief.places() is not None

    chosen: list[_Candidate] = []
    try:
        candidates = sorted(
            _candidates(job, state, kind, now, promised.stopped, wake), key=lambda each: each.rank(now)
        )
        charged += _quota_back(state, on_their_way)
        for entry in charged:
            quota.add(*entry)
        if enough():
            candidates = []  # what is on its way back will do
        elif not candidates:
            return None
        for each in candidates[:MOST_CANDIDATES]:
            its_kind = state.books.kind(each.part)
            if each.borrowing and not quota.may_reclaim(job.queue, units, each.job.queue, its_kind):
                continue  # the victims before it have brought its queue back to what it owns
            useful = relief.give(each.job.gang.bundle, each.part)
            if not useful and (its_kind != kind or quota.available(job.queue, kind) >= units):
                continue
            charge(each, -1)
            chosen.append(each)
            if enough():
                break
        else:
            if candidates:
                return None
        for each in list(reversed(chosen))[1:]:
            relief.take(each.job.gang.bundle, each.part)
            charge(each, +1)
            if enough():
                chosen.remove(each)
            else:
                relief.give(each.job.gang.bundle, each.part)
                charge(each, -1)
        places = relief.places()
    finally:
        for queue, of_kind, change in reversed(charged):
            quota.add(queue, of_kind, -change)
    assert places is not None
    causes: dict[str, StopCause] = {}
    for each in chosen:
        if each.shrink:
            causes.setdefault(each.job.id, StopCause.RESIZED)
        else:
            causes[each.job.id] = StopCause.PREEMPTED
    gone = {*causes, *(other.id for other in on_their_way)}
    counted = frozenset((each, state.jobs[each].attempts) for each in gone)
    need = needs(job, places)
    reservation = Reservation(job.id, now, need, class_ids(classes), counted, tuple(causes))
    return Eviction(reservation, tuple(causes.items()))


def _candidates(
    job: Job,
    state: ClusterState,
    kind: str,
    now: float,
    spared: Collection[str],
    wake: Callable[[float], None],
) -> Iterator[_Candidate]:
    queue = state.policy.queues[job.queue]
    quota = state.books.quota
    units = job.gang.minimum * job.gang.bundle.gpu_units
    inside = queue.preempt is Preempt.LOWER
    mine = _counts(job, state, now)
    across = (
        queue.reclaim is not Reclaim.NEVER and quota.limited and any(quota.within(job.queue, kind, units))
    )
    lawful: dict[tuple[str, str], bool] = {}

    def borrows(queue: str, its_kind: str) -> bool:
        key = queue, its_kind
        if key not in lawful:
            lawful[key] = quota.may_reclaim(job.queue, units, queue, its_kind)
        return lawful[key]

    runs, kinds = state.books.runs, (*quota.kinds, ANY)
    lawful_queues = [
        each
        for each in runs
        if each == job.queue
        or (across and each in state.policy.queues and any(borrows(each, its_kind) for its_kind in kinds))
    ]
    for other_id in (other_id for each in lawful_queues for other_id in runs[each]):
        other = state.jobs[other_id]
        attempt = other.attempt
        if attempt is None or not other.preemptible or other_id in spared or other_id in state.books.ending:
            continue
        if attempt.phase is Phase.RELEASING:
            continue
        same = other.queue == job.queue
        borrowing = across and not same and borrows(other.queue, state.books.kind(attempt))
        if same:
            allowed = inside and other.priority < job.priority and _counts(other, state, now) < mine
        else:
            allowed = borrowing and (queue.reclaim is Reclaim.ANY or other.priority < job.priority)
        least = other.gang.minimum
        shrinks = least < len(attempt.placed) and (
            allowed or (same and _comes_before(job, other, state, now))
        )
        if not allowed and not shrinks:
            continue
        protected_until = _protected_until(other, attempt, state)
        if shrinks:
            settled = max(protected_until, attempt.admitted_at + state.policy.settle_s)
            if settled > now:
                wake(settled)
            else:
                yield _Candidate(other, replace(attempt, placed=attempt.placed[least:]), borrowing, True)
                attempt = replace(attempt, placed=attempt.placed[:least])
        if allowed:
            if protected_until > now:
                wake(protected_until)
            else:
                yield _Candidate(other, attempt, borrowing, False)


def _comes_before(job: Job, other: Job, state: ClusterState, now: float) -> bool:
    """Whether `job` would be first if both waited: else `other`, shrunk for it, would take all back at once."""
    order = state.policy.order
    mine, theirs = _counts(job, state, now), _counts(other, state, now)
    if mine != theirs:
        return mine > theirs
    if order is Order.SHORTEST_FIRST:
        return False  # `outlast` asks whether it pays
    if job.owner == other.owner or order is Order.FIFO:
        return job.seq < other.seq
    standings = []
    for each in (job, other):
        usage = state.books.usage.get((each.queue, each.owner))
        held = other.gang.minimum * other.gang.bundle.gpu_units - other.held_units if each is other else 0
        now_held = usage.standing(now, state.policy.half_life_s) if usage is not None else 0.0
        standings.append(now_held + soon(held, state.policy.half_life_s))
    return standings[0] < standings[1]


def _counts(job: Job, state: ClusterState, now: float) -> int:
    """The job's priority in the order; for one that runs, if it were evicted now: it comes back with its age."""
    group = state.pending.group_of(job.id)
    if group is not None:
        return group.priority
    policy = state.policy
    aged = policy.order is not Order.SHORTEST_FIRST and now - job.submitted_at >= policy.max_age_s
    return job.priority + ONE_NAME * aged


def _protected_until(job: Job, attempt: Attempt, state: ClusterState) -> float:
    spare_s = max(job.min_runtime_s, state.policy.min_runtime_s)
    since = attempt.started_at if attempt.started_at is not None else attempt.admitted_at
    return max(attempt.admitted_at + AT_ONCE_S, since + spare_s)


def _quota_back(state: ClusterState, ending: Sequence[Job]) -> list[tuple[str, str, int]]:
    """What the queues are charged less when these have ended. What is kept for others stays charged."""
    return [
        (each.queue, state.books.kind(_attempt(each)), -each.held_units)
        for each in ending
        if each.queue in state.policy.queues
    ]


def _attempt(job: Job) -> Attempt:
    assert job.attempt is not None
    return job.attempt
