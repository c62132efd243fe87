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

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import merge
from itertools import chain, islice
from math import inf

from rm.core.capacity import NodeClass
from rm.core.fairshare import soon
from rm.core.model import Attempt, Job, StopCause
from rm.core.pending import ONE_NAME
from rm.core.policy import Order, Reclaim
from rm.core.records import replace
from rm.core.relief import Relief
from rm.core.reservations import Promised, Reservation, class_ids, coming, needs
from rm.core.resources import GPU_UNIT
from rm.core.state import ClusterState
from rm.core.transit import attempt_of, quota_back

MOST_CANDIDATES = 5_000
"""Attempts considered for one preemptor; beyond that only the cheapest are looked at."""
AT_ONCE_S = 1.0
"""What has only just been admitted is left alone for this long: no decision is taken back in the same breath."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """Whom to stop for `reservation.job_id`, and the places that this gives."""

    reservation: Reservation
    victims: tuple[tuple[str, StopCause], ...]


class _Run:
    """An attempt that somebody may be allowed to stop, and its place among those of its queue."""

    __slots__ = ("attempt", "job", "key", "kind", "spared_until")

    def __init__(self, job: Job, attempt: Attempt, kind: str, state: ClusterState, now: float) -> None:
        self.job = job
        self.attempt = attempt
        self.kind = kind
        self.key = job.priority, loss(job, now), -job.seq
        self.spared_until = _protected_until(job, attempt, state)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One way to get GPUs back: an elastic gang's bundles above its minimum (`shrink`), or all that is left."""

    run: _Run
    part: Attempt
    """The live attempt with only the bundles that this way gives back."""
    borrowing: bool
    shrink: bool

    @property
    def job(self) -> Job:
        return self.run.job

    @property
    def units(self) -> int:
        return len(self.part.placed) * self.job.gang.bundle.gpu_units


def loss(job: Job, now: float) -> float:
    """GPU-seconds that stopping the job now throws away."""
    attempt = job.attempt
    if attempt is None or attempt.started_at is None:
        return 0.0
    since = max(attempt.started_at, attempt.checkpoint_at or attempt.started_at)
    return max(0.0, now - since) * job.held_units / GPU_UNIT


class Victims:
    """The attempts that one cycle may stop, sorted when they are first asked for.

    `wake(at)` is told when somebody who is protected by `min_runtime` now could be evicted. `looked`: how many
    attempts all searches together have considered.
    """

    def __init__(self, state: ClusterState, now: float, wake: Callable[[float], None]) -> None:
        self._state = state
        self._now = now
        self._wake = wake
        self._sorted: dict[str, list[_Run]] = {}
        self.looked = 0

    def evict(self, job: Job, kind: str, classes: Sequence[NodeClass], promised: Promised) -> Eviction | None:
        """The victims whose GPUs and quota let `job` start, or None where no set of victims would."""
        state = self._state
        candidates = islice(self._candidates(job, kind, promised.stopped), MOST_CANDIDATES)
        first = next(candidates, None)
        on_their_way = list(coming(state, job.id, promised))
        if first is None and not state.books.ending and not promised.stopped:
            return None
        quota, units = state.books.quota, job.gang.least_units
        charged = quota_back(state, on_their_way)

        def charge(candidate: _Candidate, sign: int) -> None:
            entry = candidate.job.queue, candidate.run.kind, sign * candidate.units
            quota.add(*entry)
            charged.append(entry)

        def enough() -> bool:
            return quota.available(job.queue, kind) >= units and relief.fits()

        chosen: list[_Candidate] = []
        with quota.tried(charged), Relief(job.gang, state.capacity, classes, promised.owed) as relief:
            for other in on_their_way:
                relief.give(other.gang.bundle, attempt_of(other))
            met = enough()  # what is on its way back may do
            for each in () if met or first is None else chain((first,), candidates):
                self.looked += 1
                mine = each.run.kind
                if each.borrowing and not quota.may_reclaim(job.queue, units, each.job.queue, mine):
                    continue  # the victims before it have brought its queue back to what it owns
                useful = relief.give(each.job.gang.bundle, each.part)
                if not useful and (mine != kind or quota.available(job.queue, kind) >= units):
                    continue
                charge(each, -1)
                chosen.append(each)
                met = enough()
                if met:
                    break
            if not met:
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
        assert places is not None
        causes: dict[str, StopCause] = {}
        for each in chosen:
            if each.shrink:
                causes.setdefault(each.job.id, StopCause.RESIZED)
            else:
                causes[each.job.id] = StopCause.PREEMPTED
        gone = {*causes, *(other.id for other in on_their_way)}
        counted = frozenset((each, state.jobs[each].attempts) for each in gone)
        need = needs(job.gang.bundle, places)
        reservation = Reservation(job.id, self._now, need, class_ids(classes), counted, tuple(causes))
        return Eviction(reservation, tuple(causes.items()))

    def _candidates(self, job: Job, kind: str, spared: Collection[str]) -> Iterator[_Candidate]:
        """Whom `job` may stop by right: elastic gangs' surplus first, then borrowers, then its own queue's."""
        queue = self._state.policy.queues[job.queue]
        lawful = self._lawful(job, kind)
        mine = _counts(job, self._state, self._now)
        across = sorted({name for name, _ in lawful})

        def allowed(run: _Run, borrowing: bool) -> bool:
            if borrowing:
                lower = queue.reclaim is Reclaim.ANY or run.job.priority < job.priority
                return lower and (run.job.queue, run.kind) in lawful
            return (
                queue.preempts
                and run.job.priority < job.priority
                and _counts(run.job, self._state, self._now) < mine
            )

        shrunk: set[str] = set()
        sides = (True, across), (False, [job.queue])
        for borrowing, queues in sides:
            for run in merge(*map(self._elastic_of, queues), key=lambda each: each.key):
                if run.job.id in spared:
                    continue
                if allowed(run, borrowing) or (
                    not borrowing and _comes_before(job, run.job, self._state, self._now)
                ):
                    settled = max(run.spared_until, run.attempt.admitted_at + self._state.policy.settle_s)
                    if settled > self._now:
                        self._wake(settled)
                        continue
                    shrunk.add(run.job.id)
                    surplus = run.attempt.placed[run.job.gang.minimum :]
                    yield _Candidate(run, replace(run.attempt, placed=surplus), borrowing, True)
        for borrowing, queues in sides:
            for run in merge(*map(self._runs_of, queues), key=lambda each: each.key):
                if run.job.id in spared or not allowed(run, borrowing):
                    continue
                if run.spared_until > self._now:
                    self._wake(run.spared_until)
                    continue
                part = run.attempt
                if run.job.id in shrunk:
                    part = replace(part, placed=part.placed[: run.job.gang.minimum])
                yield _Candidate(run, part, borrowing, False)

    def _lawful(self, job: Job, kind: str) -> set[tuple[str, str]]:
        """(queue, kind) of other queues whose attempts `job` may reclaim, as things are now."""
        books, units = self._state.books, job.gang.least_units
        quota, queues = books.quota, self._state.policy.queues
        if not queues[job.queue].reclaims or not quota.limited:
            return set()
        if not any(quota.within(job.queue, kind, units)):
            return set()
        return {
            (name, its_kind)
            for its_kind in quota.every_kind
            for name in books.evictable
            if name != job.queue and name in queues and quota.borrows(name, its_kind)
            if quota.may_reclaim(job.queue, units, name, its_kind)
        }

    def _runs_of(self, queue: str) -> list[_Run]:
        """The queue's attempts that may be stopped at all, cheapest first."""
        found = self._sorted.get(queue)
        if found is None:
            state = self._state
            found = self._sorted[queue] = sorted(
                (
                    _Run(job, job.attempt, state.books.kind(job.attempt), state, self._now)
                    for job in map(state.jobs.__getitem__, state.books.runs.get(queue, ()))
                    if job.attempt is not None and job.preemptible
                ),
                key=lambda each: each.key,
            )
        return found

    @cached_property
    def elastic_queues(self) -> set[str]:
        """Queues in which somebody holds more than its minimum."""
        return {self._state.jobs[job_id].queue for job_id in self._state.books.elastic}

    def _elastic_of(self, queue: str) -> list[_Run]:
        """The same, of those that hold more than their minimum."""
        if queue not in self.elastic_queues:
            return []
        return [run for run in self._runs_of(queue) if run.job.id in self._state.books.elastic]


def has_a_right(job: Job, kinds: Iterable[str], state: ClusterState) -> bool:
    """Whether the job could have anybody evicted at all. Cheap: a yes need not find a victim."""
    books, rules = state.books, state.policy.queues[job.queue]
    if state.policy.order is Order.SHORTEST_FIRST or books.elastic:
        return True
    if rules.preempts and min(books.evictable.get(job.queue, ()), default=inf) < job.priority:
        return True
    units = job.gang.least_units
    return (
        rules.reclaims
        and books.quota.limited
        and any(any(books.quota.within(job.queue, kind, units)) for kind in kinds)
    )


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
        held = other.gang.least_units - other.held_units if each is other else 0
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
