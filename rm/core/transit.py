"""What is on its way back already: attempts that were told to stop, or whose groups are being removed.

Whoever comes first and for whom that is enough gets it kept (`Reservation` with `at` in the past); nobody is evicted
for what comes anyway. Most waiting jobs can't use it, for want of places or of quota, and on a large cluster there
are tens of thousands of them. So what is the same for all is worked out once, until what is kept changes: a bit per
shape for places, a number of units per queue for quota. Only what an eviction was made for is a matter of one job.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from rm.core.backfill import still_coming
from rm.core.keeping import Kept
from rm.core.model import Attempt, Job
from rm.core.options import Option
from rm.core.placement import may_fit
from rm.core.records import replace
from rm.core.relief import Relief
from rm.core.reservations import Promised, Reservation, claimed, class_ids, coming, needs
from rm.core.state import ClusterState

NOBODY = ""
_PLACE, _QUOTA = "place", "quota"
Reservations = Mapping[str, Reservation]


class Transit:
    """What is coming, as one cycle sees it until it stops somebody else.

    `before`: the reservations of the last cycle. Whoever had one of what is coming keeps its places.
    """

    def __init__(
        self, state: ClusterState, now: float, kept: Kept, stopped: Collection[str], before: Reservations
    ) -> None:
        self._state = state
        self._now = now
        self._kept = kept
        self._before = before
        self._stopped = stopped
        self._known: Promised | None = None
        self._ending = (*state.books.ending, *stopped)
        self._back = quota_back(state, (state.jobs[job_id] for job_id in self._ending))
        self._room: dict[str, int] = {}
        """Queue → the most units that it could take once all quota is back."""
        self.claimants = self._find_claimants()
        """Waiting jobs for which somebody was evicted, and for which nothing is kept yet."""
        self._mask = self._fitting() if self._ending else 0

    def less(self) -> None:
        """Something was given away. What was worked out for all is still a bound."""
        self._known = None

    def kept_for(self, reservation: Reservation) -> None:
        """Something more is kept. Where those who were stopped for it give more than it needs, the rest is for all."""
        self._known = None
        self.claimants.discard(reservation.job_id)
        evicted = sum(self._state.jobs[job_id].held_units for job_id in reservation.evicting)
        if evicted:
            self._room.clear()  # their quota is for all now
            held = sum(
                self._kept.holds[node_id].gpu_units
                for node_id in reservation.need
                if node_id in self._kept.holds
            )
            left = evicted + held - sum(each.gpu_units for each in reservation.need.values())
            self._mask |= self._state.pending.no_larger(left)

    @property
    def _promised(self) -> Promised:
        if self._known is None:
            self._known = self._kept.promised(self._stopped)
        return self._known

    def may_do(self) -> bool:
        """Whether it might be enough for anybody."""
        return bool(self._mask or self.claimants)

    def mask(self, queue: str) -> int:
        """The bits of the shapes of this queue for which it might be enough. Never leaves one out that it is for."""
        if not self._ending:
            return 0
        mask = self._for_all(queue)
        for job_id in self.claimants:
            group = self._state.pending.group_of(job_id)
            if group is not None and group.queue == queue:
                mask |= group.shape.bit
        return mask

    def may_be_for(self, job: Job, bit: int) -> bool:
        """Whether it might be enough for this job, whose shape has this bit."""
        return bool(self._ending) and (job.id in self.claimants or bool(bit & self._for_all(job.queue)))

    def _for_all(self, queue: str) -> int:
        mask = self._mask & self._state.pending.masks[queue]
        return mask and mask & self._state.pending.no_larger(self._most(queue))

    def reserve(self, job: Job, options: Sequence[Option]) -> tuple[Option, Reservation] | None:
        """What is kept for `job` of what is coming, GPUs and quota, on the first option where that is enough."""
        wants = set()
        for option in options:
            found, want = self._reserve(job, option)
            if found is not None:
                return option, found
            wants.add(want)
        if job.id in self.claimants:
            return None
        if wants == {_PLACE} and not self._state.policy.queues[job.queue].labels:
            self._mask &= ~self._state.pending.shapes[job.gang].bit  # there is none for anybody of this shape
        if wants == {_QUOTA} and not job.gang.gpu_types:
            # Nor is there quota for anybody of this queue who wants as much.
            self._room[job.queue] = min(self._most(job.queue), job.gang.least_units - 1)
        return None

    def _reserve(self, job: Job, option: Option) -> tuple[Reservation | None, str]:
        """Also for want of what there is no reservation."""
        state, kind, promised = self._state, option.kind, self._promised
        quota, units = state.books.quota, job.gang.least_units
        old = self._before.get(job.id)
        if old is not None and not self._still(old, job, option):
            old = None
        if old is not None and job.id in self.claimants:
            return self._again(old), ""  # its quota was seen to when somebody was evicted for it
        back = list(coming(state, job.id, promised))
        short = quota.available(job.queue, kind) < units
        if short:
            charged = quota_back(state, back)
            with quota.tried(charged):
                enough = quota.available(job.queue, kind) >= units
            if not enough:
                return None, _QUOTA
        if old is not None:
            return self._again(old), ""
        relief = Relief(job.gang, state.capacity, option.classes, promised.owed)
        met = [each for each in back if relief.give(each.gang.bundle, attempt_of(each))]
        places = relief.places() if met or short else None
        if places is None:
            return None, _PLACE if met else ""
        evicted = tuple(each.id for each in back if attempt_of(each).stop_by == job.id)
        counted = frozenset((each.id, each.attempts) for each in (back if short else met))
        return (
            Reservation(
                job.id, self._now, needs(job.gang.bundle, places), class_ids(option.classes), counted, evicted
            ),
            "",
        )

    def _still(self, old: Reservation, job: Job, option: Option) -> bool:
        promised, units = self._promised, job.gang.least_units
        return (
            old.at <= self._now
            and bool(old.counted)
            and old.classes == class_ids(option.classes)
            and sum(each.gpu_units for each in old.need.values()) == units
            and still_coming(old, self._state, job, promised.owed, self._stopped, self._kept.taken)
        )

    def _again(self, old: Reservation) -> Reservation:
        ending = set(self._ending)
        return replace(
            old, at=self._now, counted=frozenset(each for each in old.counted if each[0] in ending)
        )

    def _find_claimants(self) -> set[str]:
        found = set()
        for job_id in self._ending:
            attempt = attempt_of(self._state.jobs[job_id])
            if claimed(attempt, self._state, NOBODY) and attempt.stop_by not in self._promised.holders:
                found.add(attempt.stop_by)
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
            with quota.tried(self._back):
                most = self._room[queue] = quota.most_available(queue)
        return most


def fitting(state: ClusterState, among: int = -1) -> int:
    """The bits of the waiting shapes that may fit somewhere: an upper bound, so that nobody is missed.

    `among`: the bits of those that are asked, by default all.
    """
    mask, capacity = 0, state.capacity
    among &= state.pending.no_larger(capacity.free_units)
    if not among:
        return 0
    for shape in state.pending.shapes.values():
        if shape.bit & among and may_fit(shape.gang, capacity.matching(shape.gang)):
            mask |= shape.bit
    return mask


def quota_back(state: ClusterState, ending: Iterable[Job]) -> list[tuple[str, str, int]]:
    """What the queues are charged less when these have ended. What is kept for others stays charged."""
    back: dict[tuple[str, str], int] = {}
    for job in ending:
        if job.queue in state.policy.queues:
            key = job.queue, state.books.kind(attempt_of(job))
            back[key] = back.get(key, 0) - job.held_units
    return [(queue, kind, units) for (queue, kind), units in back.items()]


def attempt_of(job: Job) -> Attempt:
    """The live attempt of a job that has one."""
    assert job.attempt is not None
    return job.attempt
