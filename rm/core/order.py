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

from rm.core.fairshare import soon
from rm.core.outlast import rank_waiting
from rm.core.pending import Group
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


class Line:
    """Groups in order: those of one queue, or of all. An owner who is served steps back at once."""

    __slots__ = ("_before", "_given", "_heap", "_state")

    def __init__(
        self,
        groups: Iterable[Group],
        state: ClusterState,
        given: Given,
        before: Callable[[Turn], tuple[float, ...]] | None = None,
    ) -> None:
        """`before`: what comes before all else in the order."""
        self._state = state
        self._given = given
        self._before = before
        self._heap = [self._entry(Turn(group)) for group in groups]
        heapq.heapify(self._heap)

    def first(self) -> Turn | None:
        """Whoever comes first, or None where nobody is left."""
        while self._heap:
            entry = self._heap[0]
            fresh = self._entry(entry[-1])
            if fresh[0] == entry[0]:
                return entry[-1]
            heapq.heapreplace(self._heap, fresh)
        return None

    def drop(self) -> None:
        """The first group is done with."""
        heapq.heappop(self._heap)

    def served(self) -> None:
        """The first group's job has been dealt with: the one behind it takes its turn."""
        turn = heapq.heappop(self._heap)[-1]
        turn.index += 1
        if turn.index < len(turn.group.jobs):
            heapq.heappush(self._heap, self._entry(turn))

    def _entry(self, turn: Turn) -> tuple[tuple[float, ...], int, Turn]:
        # (priority, …, seq) is unique: no two turns are ever compared.
        key = group_key(turn, self._state, self._given)
        if self._before is not None:
            key = (*self._before(turn), *key)
        return key, turn.seq, turn


def group_key(turn: Turn, state: ClusterState, given: Given) -> tuple[float, ...]:
    """Where a turn stands in its line: lower comes first."""
    group, seq = turn.group, turn.group.jobs[turn.index][0]
    order = state.policy.order
    if order is Order.FAIR:
        return (-group.priority, given.standing(group.queue, group.owner), seq)
    if order is Order.FIFO:
        return (-group.priority, seq)
    job = state.jobs[turn.job_id]
    return (-group.priority, rank_waiting(job, state) * job.gang.gpu_units, seq)


def borrowing(within: tuple[bool, ...]) -> float:
    """0 where a queue stays within what it owns on every level of the tree; more, the further up it would borrow."""
    levels = (*within, *within[-1:] * (MOST_LEVELS - len(within)))
    return sum(0.5**level for level, owns in enumerate(levels) if not owns) + 2.0 * (not any(within))


def queue_key(queue: str, within: tuple[bool, ...], state: ClusterState) -> tuple[object, ...]:
    """Where a queue stands among the queues: lower comes first. `within`: see `QuotaTree.within`."""
    quota = state.books.quota
    levels = tuple(
        (not owns, quota.share(name)) for owns, name in zip(within, quota.path(queue), strict=True)
    )
    return (not any(within), levels, quota.share_of_nominal(queue), queue)
