"""Who comes first.

FAIR: between queues, those whose next job fits what they own come before those that would borrow; then the lowest
weighted share, level by level from the top of the tree; then allocated / nominal. Inside a queue: priority (a job
that has waited for `max_age` counts one name higher), then the owner's decayed usage, then submission.

FIFO: priority, then submission, over all queues. SHORTEST_FIRST: priority, then
what needs the fewest GPU-seconds more, as far as anybody can tell (`gittins`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from rm.core.fairshare import soon
from rm.core.outlast import rank_waiting
from rm.core.pending import Group
from rm.core.policy import Order
from rm.core.state import ClusterState

Given = dict[tuple[str, str], int]
"""(queue, owner) → units that this cycle has given already."""


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

    __slots__ = ("_given", "_heap", "_now", "_state")

    def __init__(self, groups: Iterable[Group], state: ClusterState, now: float, given: Given) -> None:
        self._state = state
        self._now = now
        self._given = given
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
        return group_key(turn, self._state, self._now, self._given), turn.seq, turn


def group_key(turn: Turn, state: ClusterState, now: float, given: Given) -> tuple[float, ...]:
    """Where a turn stands in its line: lower comes first."""
    policy, group = state.policy, turn.group
    match policy.order:
        case Order.FIFO:
            return (-group.priority, turn.seq)
        case Order.SHORTEST_FIRST:
            job = state.jobs[turn.job_id]
            score = rank_waiting(job, state) * job.gang.gpu_units
            return (-group.priority, score, turn.seq)
        case Order.FAIR:
            owner = group.queue, group.owner
            usage = state.books.usage.get(owner)
            standing = usage.standing(now, policy.half_life_s) if usage is not None else 0.0
            if owner in given:
                standing += soon(given[owner], policy.half_life_s)
            return (-group.priority, standing, turn.seq)


def queue_key(queue: str, within: tuple[bool, ...], state: ClusterState) -> tuple[object, ...]:
    """Where a queue stands among the queues: lower comes first. `within`: see `QuotaTree.within`."""
    quota = state.books.quota
    levels = tuple(
        (not owns, quota.share(name)) for owns, name in zip(within, quota.path(queue), strict=True)
    )
    return (not any(within), levels, quota.share_of_nominal(queue), queue)
