"""What is on its way back already: attempts that were told to stop, or whose groups are being removed.

Whoever comes first and for whom that is enough gets it kept (`Reservation` with `at` in the past); nobody is evicted
for what comes anyway. Most waiting jobs can't use it, for want of places or of quota, and on a large cluster there
are tens of thousands of them. So what is the same for all is worked out once, until what is kept changes: a bit per
shape for places, a number of units per queue for quota. Only what an eviction was made for is a matter of one job.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rm.core.backfill import Promised, Reservation, class_ids, coming, needs
from rm.core.model import Attempt, Job
from rm.core.options import Option
from rm.core.placement import may_fit
from rm.core.policy import ANY
from rm.core.relief import Relief
from rm.core.state import ClusterState

NOBODY = ""


class Transit:
    """What is coming, as one cycle sees it between two changes of what is kept."""

    def __init__(self, state: ClusterState, now: float, promised: Promised) -> None:
        self._state = state
        self._now = now
        self._promised = promised
        self._ending = (*state.books.ending, *promised.stopped)
        self._room: dict[str, int] = {}
        """Queue → the most units that it could take once all quota is back."""
        self.claimants = self._find_claimants()
        """Waiting jobs for which somebody was evicted, and for which nothing is kept yet."""
        self._mask = self._fitting() if self._ending else 0

    def may_do(self) -> bool:
        """Whether it might be enough for anybody."""
        return bool(self._mask or self.claimants)

    def mask(self, queue: str) -> int:
        """The bits of the shapes of this queue for which it might be enough. Never leaves one out that it is for."""
        if not self._ending:
            return 0
        mask = self._mask & self._state.pending.no_larger(self._most(queue)) if self._mask else 0
        for job_id in self.claimants:
            group = self._state.pending.group_of(job_id)
            if group is not None and group.queue == queue:
                mask |= group.shape.bit
        return mask

    def reserve(self, job: Job, options: Sequence[Option]) -> tuple[Option, Reservation] | None:
        """What is kept for `job` of what is coming, GPUs and quota, on the first option where that is enough."""
        no_place = not self._state.policy.queues[job.queue].labels and job.id not in self.claimants
        for option in options:
            found, had_quota = self._reserve(job, option)
            if found is not None:
                return option, found
            no_place = no_place and had_quota
        if no_place:
            self._mask &= ~self._state.pending.shapes[job.gang].bit  # there is none for anybody of this shape
        return None

    def _reserve(self, job: Job, option: Option) -> tuple[Reservation | None, bool]:
        """Also whether it is only for want of a place that there is no reservation."""
        state, kind, promised = self._state, option.kind, self._promised
        quota, units = state.books.quota, job.gang.minimum * job.gang.bundle.gpu_units
        short = quota.available(job.queue, kind) < units
        if short:
            charged = quota_back(state, promised.stopped)
            for entry in charged:
                quota.add(*entry)
            enough = quota.available(job.queue, kind) >= units
            for queue, of_kind, change in reversed(charged):
                quota.add(queue, of_kind, -change)
            if not enough:
                return None, False
        back = list(coming(state, job.id, promised))
        relief = Relief(job.gang, state.capacity, option.classes, promised.owed)
        met = [each for each in back if relief.give(each.gang.bundle, attempt_of(each))]
        places = relief.places() if met or short else None
        if places is None:
            return None, bool(met)
        evicted = tuple(each.id for each in back if attempt_of(each).stop_by == job.id)
        counted = frozenset((each.id, each.attempts) for each in (back if short else met))
        return (
            Reservation(
                job.id, self._now, needs(job.gang.bundle, places), class_ids(option.classes), counted, evicted
            ),
            False,
        )

    def _find_claimants(self) -> set[str]:
        found = set()
        for job_id in self._ending:
            attempt = attempt_of(self._state.jobs[job_id])
            by = attempt.stop_by
            if (
                by
                and attempt.stop is not None
                and attempt.stop.comes_back
                and by not in self._promised.holders
            ):
                found.add(by)
        return found

    def _fitting(self) -> int:
        capacity = self._state.capacity
        mark = capacity.mark()
        for node_id, owed in self._promised.owed.items():
            if node_id in capacity:
                capacity.keep_free(node_id, owed)
        for job in coming(self._state, NOBODY, self._promised):
            capacity.give(job.gang.bundle, attempt_of(job).placed)
        mask = fitting(self._state)
        capacity.rollback(mark)
        return mask

    def _most(self, queue: str) -> int:
        most = self._room.get(queue)
        if most is None:
            quota = self._state.books.quota
            charged = quota_back(self._state, self._promised.stopped) if quota.limited else []
            for entry in charged:
                quota.add(*entry)
            most = self._room[queue] = max(quota.available(queue, kind) for kind in (*quota.kinds, ANY))
            for of_queue, kind, change in reversed(charged):
                quota.add(of_queue, kind, -change)
        return most


def fitting(state: ClusterState) -> int:
    """The bits of the waiting shapes that may fit somewhere: an upper bound, so that nobody is missed."""
    mask, capacity = 0, state.capacity
    for shape in state.pending.shapes.values():
        if may_fit(shape.gang, capacity.matching(shape.gang)):
            mask |= shape.bit
    return mask


def quota_back(state: ClusterState, stopped: Collection[str]) -> list[tuple[str, str, int]]:
    """What the queues are charged less when all that is ending has ended. What is kept for others stays charged."""
    ending = [state.jobs[job_id] for job_id in (*state.books.ending, *stopped)]
    return [
        (each.queue, state.books.kind(attempt_of(each)), -each.held_units)
        for each in ending
        if each.queue in state.policy.queues
    ]


def attempt_of(job: Job) -> Attempt:
    """The live attempt of a job that has one."""
    assert job.attempt is not None
    return job.attempt
