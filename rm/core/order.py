"""Who comes first.

FAIR: between queues, those whose next job fits what they own come before those that would borrow; then the lowest
weighted share, level by level from the top of the tree; then allocated / nominal. Inside a queue: priority (a job
that has waited for `max_age` counts one name higher), then the owner's decayed usage, then submission.

FIFO: priority, then submission, over all queues. SHORTEST_FIRST: priority, then
what needs the fewest GPU-seconds more, as far as anybody can tell (`gittins`). Where there are quotas, whoever stays
within what it owns comes before all that under both: else what it takes back would go to its victim again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Protocol

from rm.core.fairshare import soon
from rm.core.outlast import rank_waiting
from rm.core.pending import Group, Lane
from rm.core.policy import Order
from rm.core.state import ClusterState

MOST_LEVELS = 12
"""Levels of queues that `borrowing` tells apart."""


class Given:
    """What this cycle has given to whom, and the standings that follow. One for all lines of a cycle."""

    __slots__ = ("_half_life_s", "_now", "_standings", "_units", "_usage")

    def __init__(self, state: ClusterState, now: float) -> None:
        self._usage = state.books.usage
        self._half_life_s = state.policy.half_life_s
        self._now = now
        self._units: dict[tuple[str, str], int] = {}
        self._standings: dict[tuple[str, str], float] = {}

    def give(self, queue: str, owner: str, units: int) -> None:
        key = queue, owner
        self._units[key] = self._units.get(key, 0) + units
        self._standings.pop(key, None)

    def units(self, queue: str, owner: str) -> int:
        """Units given in this cycle."""
        return self._units.get((queue, owner), 0)

    def standing(self, queue: str, owner: str) -> float:
        """The owner's decayed usage, what was given just now included."""
        key = queue, owner
        found = self._standings.get(key)
        if found is None:
            usage = self._usage.get(key)
            found = usage.standing(self._now, self._half_life_s) if usage is not None else 0.0
            if key in self._units:
                found += soon(self._units[key], self._half_life_s)
            self._standings[key] = found
        return found


class Turn:
    """A group in a line, and the first of its jobs that the cycle has not dealt with."""

    __slots__ = ("group", "index")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.index = 0

    @property
    def job_id(self) -> str:
        return self.group.jobs[self.index][1]

    @property
    def seq(self) -> int:
        return self.group.jobs[self.index][0]


Worth = Callable[[str], int]
"""Queue → the bits of the shapes whose jobs need to be looked at now."""


class Line(Protocol):
    """Turns in order. Whoever is not worth a look when its turn comes is dropped."""

    def first(self, worth: Worth) -> Turn | None:
        """Whoever comes first, or None where nobody is left."""

    def drop(self) -> None:
        """The first group is done with."""

    def served(self) -> None:
        """The first group's job has been dealt with: the one behind it takes its turn."""


class _Walk:
    """One pass through a lane: its groups in the order of their first jobs."""

    __slots__ = ("_again", "_at", "_turn", "lane")

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._at = 0
        self._turn: Turn | None = None
        self._again: list[tuple[int, Turn]] = []
        """Groups of which a job was served, by the seq of the next."""

    def first(self, mask: int) -> Turn | None:
        """The next turn, those whose shapes are not in `mask` left out for good."""
        heads = self.lane.heads
        while self._at < len(heads) and not heads[self._at][1].shape.bit & mask:
            self._at += 1
            self._turn = None
        while self._again and not self._again[0][1].group.shape.bit & mask:
            heapq.heappop(self._again)
        if self._is_again():
            return self._again[0][1]
        if self._at == len(heads):
            return None
        if self._turn is None:
            self._turn = Turn(heads[self._at][1])
        return self._turn

    def drop(self) -> Turn:
        """Take away what `first` has found."""
        if self._is_again():
            return heapq.heappop(self._again)[1]
        turn, self._turn = self._turn, None
        assert turn is not None
        self._at += 1
        return turn

    def served(self) -> None:
        turn = self.drop()
        turn.index += 1
        if turn.index < len(turn.group.jobs):
            heapq.heappush(self._again, (turn.seq, turn))

    def _is_again(self) -> bool:
        heads = self.lane.heads
        return bool(self._again) and (self._at == len(heads) or self._again[0][0] < heads[self._at][0])


class FairLine:
    """The lanes of one queue: priority, then the owner's usage, then submission. Who is served steps back at once."""

    __slots__ = ("_given", "_heap", "_queue")

    def __init__(self, queue: str, lanes: Iterable[Lane], mask: int, given: Given) -> None:
        self._queue = queue
        self._given = given
        self._heap: list[tuple[float, float, int, _Walk]] = []
        for lane in lanes:
            if lane.mask & mask:
                self._push(_Walk(lane), mask)

    def first(self, worth: Worth) -> Turn | None:
        mask = worth(self._queue)
        while self._heap:
            entry = self._heap[0]
            walk = entry[-1]
            turn = walk.first(mask) if walk.lane.mask & mask else None
            if turn is None:
                heapq.heappop(self._heap)
                continue
            fresh = self._key(walk.lane, turn)
            if fresh == entry[:3]:
                return turn
            heapq.heapreplace(self._heap, (*fresh, walk))
        return None

    def drop(self) -> None:
        self._heap[0][-1].drop()

    def served(self) -> None:
        self._heap[0][-1].served()

    def _push(self, walk: _Walk, mask: int) -> None:
        turn = walk.first(mask)
        if turn is not None:
            heapq.heappush(self._heap, (*self._key(walk.lane, turn), walk))

    def _key(self, lane: Lane, turn: Turn) -> tuple[float, float, int]:
        # (…, seq) is unique: no two walks are ever compared.
        return -lane.priority, self._given.standing(lane.queue, lane.owner), turn.seq


class RankedLine:
    """Groups of all queues, by a rank of their own: `fifo`, `shortest_first`. `before`: what counts more than that."""

    __slots__ = ("_before", "_heap", "_state")

    def __init__(
        self,
        groups: Iterable[Group],
        worth: Worth,
        state: ClusterState,
        before: Callable[[Turn], tuple[float, ...]] | None = None,
    ) -> None:
        self._state = state
        self._before = before
        self._heap = [self._entry(Turn(group)) for group in groups if group.shape.bit & worth(group.queue)]
        heapq.heapify(self._heap)

    def first(self, worth: Worth) -> Turn | None:
        while self._heap:
            key, _, turn = self._heap[0]
            if not turn.group.shape.bit & worth(turn.group.queue):
                heapq.heappop(self._heap)
                continue
            if self._before is None:
                return turn
            fresh = self._entry(turn)
            if fresh[0] == key:
                return turn
            heapq.heapreplace(self._heap, fresh)
        return None

    def drop(self) -> None:
        heapq.heappop(self._heap)

    def served(self) -> None:
        turn = heapq.heappop(self._heap)[-1]
        turn.index += 1
        if turn.index < len(turn.group.jobs):
            heapq.heappush(self._heap, self._entry(turn))

    def _entry(self, turn: Turn) -> tuple[tuple[float, ...], int, Turn]:
        # (…, seq) is unique: no two turns are ever compared.
        before = () if self._before is None else self._before(turn)
        if self._state.policy.order is Order.FIFO:
            return (*before, -turn.group.priority), turn.seq, turn
        job = self._state.jobs[turn.job_id]
        needed_s = rank_waiting(job, self._state) * job.gang.gpu_units
        return (*before, -turn.group.priority, needed_s), turn.seq, turn


def borrowing(within: tuple[bool, ...]) -> float:
    """0 where a queue stays within what it owns on every level of the tree; more, the further up it would borrow."""
    levels = (*within, *within[-1:] * (MOST_LEVELS - len(within)))
    return sum(0.5**level for level, owns in enumerate(levels) if not owns) + 2.0 * (not any(within))


def queue_key(queue: str, within: tuple[bool, ...], state: ClusterState) -> tuple[object, ...]:
    """Where a queue stands among the queues: lower comes first. `within`: see `QuotaTree.within`."""
    quota = state.books.quota
    known = quota.places(queue)
    if within not in known:
        levels = tuple(
            (not owns, quota.share(name)) for owns, name in zip(within, quota.path(queue), strict=True)
        )
        known[within] = (not any(within), levels, quota.share_of_nominal(queue), queue)
    return known[within]
