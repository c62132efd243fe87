"""Ray's view of the nodes, turned into events; and the place where freed capacity is seen.

Ray pushes nothing of this to Python, so it is read: slowly when nothing moves, every 25 ms while somebody waits
for a change. One reader serves all who wait. What our own groups hold is told apart from what strangers hold by
the `GPU_group_<id>` resources that a node carries as long as a group's bundle is committed there: they come and
go in the same report as the node's free GPUs, so "the group's key is gone" means that its capacity is back.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import ray
from ray._private.state import available_resources_per_node, total_resources_per_node

from rm.core.events import Event, ForeignUseObserved, NodeJoined, NodeLost
from rm.core.resources import gpu_units

log = logging.getLogger("rm.nodes")

FAST_S = 0.025
Amounts = tuple[int, int, int]
"""GPU units, milli-CPUs, bytes."""
_GROUP = re.compile(r"^(CPU|GPU|memory|bundle)_group_([0-9a-f]{36})$")
"""A group's wildcard resource on a node: the sum over its bundles there."""


@dataclass(frozen=True, slots=True)
class SeenNode:
    """One alive node as Ray reports it. Amounts: GPU units, milli-CPUs, bytes."""

    id: str
    name: str
    gpu_units: int
    cpu_milli: int
    memory_bytes: int
    free_gpu_units: int
    free_cpu_milli: int
    free_memory_bytes: int
    labels: tuple[tuple[str, str], ...]
    groups: dict[str, Amounts]
    """Committed groups, ours and others': id → (GPU units, milli-CPUs, bytes)."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One reading. `at` is when it began, on the monotonic clock."""

    at: float = 0.0
    nodes: dict[str, SeenNode] = field(default_factory=dict)

    def holds(self, group_id: str, node_id: str) -> bool:
        node = self.nodes.get(node_id)
        return node is not None and group_id in node.groups


class NodeWatch:
    """Reads Ray's nodes and posts what changed. `ours(group_id)` tells which groups are this allocator's."""

    def __init__(
        self,
        post: Callable[[Event], None],
        ours: Callable[[str], bool],
        *,
        clock: Callable[[], float],
        poll_s: float,
    ) -> None:
        self._post = post
        self._ours = ours
        self._clock = clock
        self._poll_s = poll_s
        self._waiting = 0
        self._hurry = asyncio.Event()
        self._next: asyncio.Future[None] | None = None
        self._known: dict[str, SeenNode] = {}
        self._foreign: dict[str, Amounts] = {}
        self._unconfirmed: dict[str, Amounts] = {}
        self.seen = Seen()

    async def run(self) -> None:
        """Read for ever. A reading that fails (the GCS restarts) is logged and tried again."""
        failures = 0
        while True:
            try:
                self._hurry.clear()
                await self.observe()
                failures = 0
            except Exception:
                failures += 1
                if failures in (1, 10, 100):
                    log.warning("Ray's nodes can't be read (%d times in a row)", failures, exc_info=True)
            try:
                await asyncio.wait_for(self._hurry.wait(), FAST_S if self._waiting else self._poll_s)
            except TimeoutError:
                continue
            await asyncio.sleep(FAST_S)

    async def observe(self) -> None:
        """One reading, and the events that it brings."""
        seen = await asyncio.to_thread(read_nodes)
        self.seen = seen
        self._report(seen)
        waiting, self._next = self._next, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def until(self, condition: Callable[[Seen], bool], timeout_s: float) -> bool:
        """Wait until a reading satisfies `condition`; False when `timeout_s` passes first."""
        deadline = time.monotonic() + timeout_s
        self._waiting += 1
        self._hurry.set()
        try:
            while not condition(self.seen):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if self._next is None:
                    self._next = asyncio.get_running_loop().create_future()
                await asyncio.wait([self._next], timeout=left)
            return True
        finally:
            self._waiting -= 1

    def _report(self, seen: Seen) -> None:
        now = self._clock()
        for node_id in self._known.keys() - seen.nodes.keys():
            self._post(NodeLost(now, node_id))
            self._foreign.pop(node_id, None)
            self._unconfirmed.pop(node_id, None)
        for node in seen.nodes.values():
            if _identity(self._known.get(node.id)) != _identity(node):
                slots = node.gpu_units // 10_000
                self._post(
                    NodeJoined(now, node.id, node.name, slots, node.cpu_milli, node.memory_bytes, node.labels)
                )
                self._foreign.pop(node.id, None)
            foreign = self._confirmed(node.id, self._held_by_others(node))
            if foreign != self._foreign.get(node.id, (0, 0, 0)):
                self._foreign[node.id] = foreign
                self._post(ForeignUseObserved(now, node.id, *foreign))
        self._known = dict(seen.nodes)

    def _confirmed(self, node_id: str, held: Amounts) -> Amounts:
        """What two readings in a row agree that strangers hold; less at once, more only when seen again.

        One reading is several calls. A group of ours that comes or goes between them, or whose id we have not
        been told yet, looks like a stranger for one reading.
        """
        before = self._unconfirmed.get(node_id, (0, 0, 0))
        self._unconfirmed[node_id] = held
        confirmed = (min(held[0], before[0]), min(held[1], before[1]), min(held[2], before[2]))
        if confirmed != held:
            self._hurry.set()
        return confirmed

    def _held_by_others(self, node: SeenNode) -> Amounts:
        ours = [amounts for group, amounts in node.groups.items() if self._ours(group)]
        return (
            max(0, node.gpu_units - node.free_gpu_units - sum(each[0] for each in ours)),
            max(0, node.cpu_milli - node.free_cpu_milli - sum(each[1] for each in ours)),
            max(0, node.memory_bytes - node.free_memory_bytes - sum(each[2] for each in ours)),
        )


def _identity(node: SeenNode | None) -> tuple[object, ...] | None:
    if node is None:
        return None
    return node.name, node.gpu_units, node.cpu_milli, node.memory_bytes, node.labels


def read_nodes() -> Seen:
    """One reading of all alive nodes. Blocks for some milliseconds."""
    at = time.monotonic()
    alive = [node for node in ray.nodes() if node["Alive"]]
    available = available_resources_per_node()
    totals = total_resources_per_node()
    return Seen(at, {n["NodeID"]: _seen(n, available, totals) for n in alive if n["NodeID"] in available})


def _seen(
    node: dict[str, object], available: dict[str, dict[str, float]], totals: dict[str, dict[str, float]]
) -> SeenNode:
    node_id = str(node["NodeID"])
    resources: dict[str, float] = node["Resources"]  # type: ignore[assignment]
    labels: dict[str, str] = node["Labels"]  # type: ignore[assignment]
    free = available.get(node_id, {})
    return SeenNode(
        id=node_id,
        name=str(node["NodeName"] or node["NodeManagerHostname"]),
        gpu_units=gpu_units(resources.get("GPU", 0.0)),
        cpu_milli=round(resources.get("CPU", 0.0) * 1000),
        memory_bytes=int(resources.get("memory", 0.0)),
        free_gpu_units=gpu_units(free.get("GPU", 0.0)),
        free_cpu_milli=round(free.get("CPU", 0.0) * 1000),
        free_memory_bytes=int(free.get("memory", 0.0)),
        labels=tuple(sorted(labels.items())),
        groups=_groups(totals.get(node_id, {})),
    )


def _groups(resources: dict[str, float]) -> dict[str, Amounts]:
    found: dict[str, list[int]] = {}
    for key, amount in resources.items():
        if match := _GROUP.match(key):
            entry = found.setdefault(match[2], [0, 0, 0])
            if match[1] == "GPU":
                entry[0] = gpu_units(amount)
            elif match[1] == "CPU":
                entry[1] = round(amount * 1000)
            elif match[1] == "memory":
                entry[2] = int(amount)
    return {group: (gpu, cpu, memory) for group, (gpu, cpu, memory) in found.items()}
