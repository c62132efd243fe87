"""Placement under the published rule: gangs stay together on as few nodes as possible.

A job of up to one node's GPUs goes to the fullest node that still holds it. A larger one takes whole free nodes,
and its remainder, if any, goes to the freest node that is left. Ties: the node with the lowest number. A larger
request never fits where a smaller one doesn't, which is what lets a scan over waiting jobs stop early.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

from rm.sim.cluster import Pool


class Share(NamedTuple):
    """So many GPUs of one node."""

    node: int
    gpus: int


class ConsolidatedNodes:
    """The free GPUs of a pool, as one sorted list of node numbers for each free count."""

    def __init__(self, pool: Pool) -> None:
        self.per_node = pool.gpus_per_node
        self.free = pool.gpus
        self._node_free = [pool.gpus_per_node] * pool.nodes
        self._by_free: list[list[int]] = [[] for _ in range(pool.gpus_per_node + 1)]
        self._by_free[pool.gpus_per_node] = list(range(pool.nodes))

    def place(self, gpus: int) -> tuple[Share, ...] | None:
        """Take `gpus` GPUs, or None and nothing is changed."""
        if gpus > self.free:
            return None
        if gpus <= self.per_node:
            for free in range(gpus, self.per_node + 1):
                if self._by_free[free]:
                    return self._take((Share(self._by_free[free][0], gpus),))
            return None
        whole, rest = divmod(gpus, self.per_node)
        empty = self._by_free[self.per_node]
        if len(empty) < whole:
            return None
        shares = [Share(node, self.per_node) for node in empty[:whole]]
        if rest:
            node = self._freest(after=whole)
            if node is None or self._node_free[node] < rest:
                return None
            shares.append(Share(node, rest))
        return self._take(tuple(shares))

    def release(self, shares: tuple[Share, ...]) -> None:
        for node, gpus in shares:
            self._set_free(node, self._node_free[node] + gpus)

    def _take(self, shares: tuple[Share, ...]) -> tuple[Share, ...]:
        for node, gpus in shares:
            self._set_free(node, self._node_free[node] - gpus)
        return shares

    def _freest(self, after: int) -> int | None:
        """The freest node, the first `after` empty ones left out."""
        empty = self._by_free[self.per_node]
        if len(empty) > after:
            return empty[after]
        return next((nodes[0] for nodes in self._by_free[self.per_node - 1 : 0 : -1] if nodes), None)

    def _set_free(self, node: int, free: int) -> None:
        before = self._node_free[node]
        bucket = self._by_free[before]
        del bucket[bisect_left(bucket, node)]
        insort(self._by_free[free], node)
        self._node_free[node] = free
        self.free += free - before
