"""What the running cycle keeps free, and for whom.

A reservation names what a job needs and when (`backfill`): GPUs, and the CPUs and memory beside them. What of it is
free already is *held*: it is unavailable to everybody behind, by the same means by which what strangers have is. What
is not free yet is *owed*. Jobs that end before the reservations are due may look at the nodes with the holds lifted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf

from rm.core.capacity import NodeClass
from rm.core.model import Attempt, Job, Phase, PlacedBundle
from rm.core.reservations import Promised, Reservation, Taken, class_ids, end_if_started, hold
from rm.core.resources import NOTHING, Amount
from rm.core.state import ClusterState


class Kept:
    """The reservations of one cycle, and what follows from them on each node."""

    def __init__(self, state: ClusterState, now: float) -> None:
        self._state = state
        self._now = now
        self.reservations: dict[str, Reservation] = {}
        self.holds: dict[str, Amount] = {}
        """By node, what is free and kept."""
        self._needed: dict[str, Amount] = {}
        self._owed: dict[str, Amount] | None = None
        self.taken: dict[str, list[Taken]] = {}
        """By node, what the cycle has given away: the books don't know of it yet."""
        self.fresh: list[tuple[float, Job, Attempt]] = []
        """The same as attempts, with their planned ends."""

    def keep(self, reservation: Reservation) -> None:
        """Nobody behind gets what the reservation needs."""
        self.reservations[reservation.job_id] = reservation
        self._hold(reservation)
        if self._owed is not None:
            for node_id, need in reservation.need.items():
                self._needed[node_id] = self._needed.get(node_id, NOTHING) + need
                self._owe(node_id)

    def forget(self, job_ids: Collection[str]) -> None:
        """These jobs have no reservation any more."""
        with self.lifted():
            for job_id in job_ids:
                del self.reservations[job_id]

    def took(self, job: Job, places: tuple[PlacedBundle, ...]) -> bool:
        """A job was admitted here. True where a hold could become smaller: those behind may use the rest."""
        end = end_if_started(job, self._state, self._now)
        attempt = Attempt(job.attempts + 1, places, Phase.RESERVING, self._now)
        for each in places:
            taken = Taken((job.id, attempt.number), each.slots, job.gang.bundle, end)
            self.taken.setdefault(each.node_id, []).append(taken)
        self.fresh.append((end, job, attempt))
        touched = any(each.node_id in self.holds for each in places)
        if touched:
            with self.lifted():
                pass
        return touched

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The nodes without holds, for a moment. Afterwards what is still needed is held."""
        for node_id, held in self.holds.items():
            self._state.capacity.keep_free(node_id, -held)
        self.holds, self._owed = {}, None
        try:
            yield
        finally:
            self._owed = None
            for reservation in self.reservations.values():
                self._hold(reservation)

    @contextmanager
    def passed_over(self) -> Iterator[None]:
        """As `lifted`, where nothing is given away meanwhile and nothing forgotten: the same is held afterwards."""
        mark = self._state.capacity.mark()
        for node_id, held in self.holds.items():
            self._state.capacity.keep_free(node_id, -held)
        try:
            yield
        finally:
            self._state.capacity.rollback(mark)

    def promised(self, stopped: Collection[str]) -> Promised:
        """What whoever asks next must not plan with. `stopped`: whom the cycle has told to stop."""
        return Promised(self.owed(), self.reservations.keys(), stopped)

    def owed(self) -> Mapping[str, Amount]:
        """By node, what reservations need beyond what is kept for them already."""
        if self._owed is None:
            self._owed, self._needed = {}, {}
            for reservation in self.reservations.values():
                for node_id, need in reservation.need.items():
                    self._needed[node_id] = self._needed.get(node_id, NOTHING) + need
            for node_id in self._needed:
                self._owe(node_id)
        return self._owed

    def _owe(self, node_id: str) -> None:
        assert self._owed is not None
        held = self.holds.get(node_id)
        left = self._needed[node_id] if held is None else self._needed[node_id].beyond(held)
        if left:
            self._owed[node_id] = left
        else:
            self._owed.pop(node_id, None)

    def covered(self) -> set[int]:
        """The node classes on which somebody has a reservation."""
        return {each for reservation in self.reservations.values() for each in reservation.classes}

    def due(self, classes: Sequence[NodeClass]) -> float:
        """When the first reservation on these classes is due; -inf where nobody knows."""
        ids = class_ids(classes)
        dates = [each.at for each in self.reservations.values() if each.classes & ids]
        return -inf if inf in dates else min(dates, default=inf)

    def last_date(self) -> float:
        """When the last reservation with a date is due; now where there is none."""
        return max((each.at for each in self.reservations.values() if each.at != inf), default=self._now)

    def is_coming(self, job_id: str) -> bool:
        """Whether GPUs are on their way back for the job."""
        reservation = self.reservations.get(job_id)
        return reservation is not None and reservation.at <= self._now

    def _hold(self, reservation: Reservation) -> None:
        for node_id in reservation.need:
            held = hold(reservation, node_id, self._state, self.taken.get(node_id, ()))
            if held:
                self.holds[node_id] = self.holds.get(node_id, NOTHING) + held
                self._state.capacity.keep_free(node_id, held)
