"""The nodes of a replay: a fixed set, or one that grows and shrinks with the demand.

Growing is an approximation of what an autoscaler does with our scheduler, and simpler: after each cycle the GPUs of
the waiting jobs that quota would admit are counted in nodes; what idle and booting nodes do not cover is launched,
up to the most that the pool may have, and joins after `boot_s`. A node that has been idle for `idle_s` leaves when
nobody waits for it, down to the pool's least. No launch fails, and a gang does not wait for all of its nodes to be
launchable. A node costs from its launch until it leaves.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from math import inf

from rm.core.events import Event, NodeJoined, NodeLost, NodeTypesObserved
from rm.core.model import NodeShape
from rm.core.resources import GPU_UNIT
from rm.core.state import ClusterState
from rm.sim.cluster import Pool, SimCluster

Labels = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Growing:
    """A pool and its nodes. `idle`: node id → since when; the longest idle first."""

    pool: Pool
    labels: Labels
    nodes: dict[str, None] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)
    booting: int = 0


class Fleet:
    """Tells of nodes as events. `sizes`: (moment, GPUs that are up) at every change."""

    def __init__(self, cluster: SimCluster, boot_s: float, idle_s: float) -> None:
        self._cluster = cluster
        self._boot_s = boot_s
        self._idle_s = idle_s
        self._pools = [_Growing(pool, labels) for pool, labels in cluster.labelled()]
        self._boots: list[tuple[float, int]] = []
        self._named = 0
        self._leave_at = inf
        self._bought_s = 0.0
        self._extra = 0
        self._since = 0.0
        self.sizes: list[tuple[float, float]] = []

    def open(self, now: float) -> list[Event]:
        """The nodes that are there from the start."""
        self._since = now
        events: list[Event] = []
        for growing in self._pools:
            pool = growing.pool
            for _ in range(pool.nodes if pool.least is None else pool.least):
                events.append(self._join(growing, now))
        if self._cluster.grows:
            events.append(self._launchable(now))
        self._note_size(now)
        return events

    def come(self, now: float) -> list[Event]:
        """The nodes whose boot has ended."""
        events: list[Event] = []
        while self._boots and self._boots[0][0] <= now:
            _, number = heapq.heappop(self._boots)
            growing = self._pools[number]
            growing.booting -= 1
            events.append(self._join(growing, now))
        if events:
            self._note_size(now)
        return events

    def adjust(self, state: ClusterState, now: float) -> list[Event]:
        """Launch what the waiting jobs need, and let go what nobody needs. Called after each cycle."""
        events: list[Event] = []
        self._leave_at = inf
        for number, growing in enumerate(self._pools):
            if growing.pool.least is None:
                continue
            _note_idle(growing, state, now)
            wanted = self._wanted(growing, state)
            missing = wanted - len(growing.idle) - growing.booting
            room = growing.pool.nodes - len(growing.nodes) - growing.booting
            for _ in range(max(0, min(missing, room))):
                growing.booting += 1
                self._count(now, +1)
                heapq.heappush(self._boots, (now + self._boot_s, number))
            spare = min(len(growing.idle) - wanted, len(growing.nodes) - growing.pool.least)
            for node_id, since in list(growing.idle.items())[: max(0, spare)]:
                if since + self._idle_s > now:
                    self._leave_at = min(self._leave_at, since + self._idle_s)
                    break
                del growing.idle[node_id], growing.nodes[node_id]
                self._count(now, -1)
                events.append(NodeLost(now, node_id))
        if events:
            self._note_size(now)
        return events

    def next_due(self) -> float:
        """When a node joins, or may leave, next."""
        return min(self._boots[0][0] if self._boots else inf, self._leave_at)

    def bought_s(self, now: float) -> float:
        """Node-seconds beyond each pool's least, until `now`."""
        self._count(now, 0)
        return self._bought_s

    def _wanted(self, growing: _Growing, state: ClusterState) -> int:
        """Nodes that the waiting jobs of this pool would fill, at most what a pool can have."""
        pool, quota, nodes = growing.pool, state.books.quota, 0.0
        kind = quota.kind(pool.gpu_type or None)
        for queue, groups in state.pending.groups.items():
            if not self._cluster.serves(pool, queue):
                continue
            left = quota.available(queue, kind)
            for group in groups.values():
                gang = group.shape.gang
                if gang.gpu_types and pool.gpu_type not in gang.gpu_types:
                    continue
                jobs = min(len(group.jobs), left // gang.gpu_units)
                left -= jobs * gang.gpu_units
                bundle = gang.bundle.gpu_units
                on_one = pool.gpus_per_node * GPU_UNIT // bundle
                nodes += jobs * gang.count / on_one
        return min(math.ceil(nodes), pool.nodes)

    def _join(self, growing: _Growing, now: float) -> Event:
        self._named += 1
        node_id = f"node{self._named}"
        growing.nodes[node_id] = None
        return NodeJoined(now, node_id, node_id, growing.pool.gpus_per_node, 0, 0, growing.labels)

    def _launchable(self, now: float) -> Event:
        """What the pools may have beyond their least. Said once: it only has to bound what is feasible."""
        shapes = tuple(
            NodeShape(each.pool.gpus_per_node, 0, 0, each.labels, each.pool.nodes - each.pool.least)
            for each in self._pools
            if each.pool.least is not None and each.pool.nodes > each.pool.least
        )
        return NodeTypesObserved(now, shapes)

    def _count(self, now: float, change: int) -> None:
        self._bought_s += self._extra * (now - self._since)
        self._since = now
        self._extra += change

    def _note_size(self, now: float) -> None:
        gpus = sum(len(each.nodes) * each.pool.gpus_per_node for each in self._pools)
        self.sizes.append((now, float(gpus)))


def _note_idle(growing: _Growing, state: ClusterState, now: float) -> None:
    charged = state.books.charged_on
    for node_id in growing.nodes:
        if node_id in charged:
            growing.idle.pop(node_id, None)
        else:
            growing.idle.setdefault(node_id, now)
