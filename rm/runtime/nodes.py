"""Ray's view of the nodes, turned into events; and the place where freed capacity is seen.

Ray pushes nothing of this to Python, so it is read: slowly when nothing moves, every 25 ms while somebody waits
for a change. One reader serves all who wait. What our own groups hold is told apart from what strangers hold by
the `GPU_group_<id>` resources that a node carries as long as a group's bundle is committed there: they come and
go in the same report as the node's free GPUs, so "the group's key is gone" means that its capacity is back.

A GCS that was restarted knows the nodes from Redis, but not what they hold: until each raylet has reported to it, a
second or two later, Ray's own calls show every node as free and every group as gone. Such a node is *unheard*: it is
taken as it last was, and nothing is concluded from it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import ResourcesData, ResourceUsageBatchData

from rm.core.events import Event, ForeignUseObserved, NodeJoined, NodeLost
from rm.core.resources import gpu_units

log = logging.getLogger("rm.nodes")

FAST_S = 0.025
HEARD_S = 5.0
"""How long a start waits for the nodes that Ray lists and that have not reported to it. Live ones take a second."""
START_S = 60.0
"""How long a start waits for a reading."""
Amounts = tuple[int, int, int]
"""GPU units, milli-CPUs, bytes."""
_GROUP = re.compile(r"^(CPU|GPU|memory|bundle)_group_([0-9a-f]{36})$")
"""A group's wildcard resource on a node: the sum over its bundles there."""
_OWN = re.compile(r"^node:(?!__)")


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
    own_resource: str = ""
    """The resource by which Ray names the node."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One reading. `at` is when it began, on the monotonic clock."""

    at: float = 0.0
    nodes: dict[str, SeenNode] = field(default_factory=dict)
    unheard: frozenset[str] = frozenset()
    """Live nodes that have not reported to this GCS. Those in `nodes` are as they were before it was restarted."""

    def holds(self, group_id: str, node_id: str) -> bool:
        node = self.nodes.get(node_id)
        return node is not None and group_id in node.groups

    def lacks(self, group_id: str, node_id: str) -> bool:
        """Whether the node has said that it does not hold the group, or is gone. Not the same as not holding it."""
        return node_id not in self.unheard and not self.holds(group_id, node_id)

    def gone(self, node_id: str) -> bool:
        """Whether Ray no longer lists the node as alive. Before the first reading nothing is gone."""
        return self.at > 0 and node_id not in self.nodes and node_id not in self.unheard


class NodeGone(Exception):
    """A node has left the cluster while something was to happen there."""

    def __init__(self, node_id: str) -> None:
        super().__init__(f"node {node_id[:8]} is gone")
        self.node_id = node_id


class NodeWatch:
    """Reads Ray's nodes and posts what changed. `ours(group_id)` tells which groups are this allocator's.

    `kept(node_id)`: GPU units there that are in quarantine, which Ray counts as used and the core knows of already.
    """

    def __init__(
        self,
        post: Callable[[Event], None],
        ours: Callable[[str], bool],
        *,
        clock: Callable[[], float],
        poll_s: float,
        kept: Callable[[str], int] = lambda _: 0,
    ) -> None:
        self._post = post
        self._ours = ours
        self._kept = kept
        self._clock = clock
        self._poll_s = poll_s
        self._waiting = 0
        self._hurry = asyncio.Event()
        self._next: asyncio.Future[None] | None = None
        self._known: dict[str, SeenNode] = {}
        self._expected: set[str] = set()
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

    async def first(self, expected: Iterable[str]) -> None:
        """The readings before anything is planned: until every live node is heard, or has had its time.

        `expected`: nodes that the ledger believes to be there. Those that are not are told of as lost.
        Raises what Ray raises where its nodes can't be read for START_S.
        """
        began = time.monotonic()
        self._expected = set(expected)
        while True:
            try:
                await self.observe()
            except Exception:
                if time.monotonic() - began > START_S:
                    raise
                log.warning("Ray's nodes can't be read yet", exc_info=True)
            else:
                if not self.seen.unheard or time.monotonic() - began > HEARD_S:
                    return
            await asyncio.sleep(4 * FAST_S)

    async def observe(self) -> None:
        """One reading, and the events that it brings."""
        seen = await asyncio.to_thread(read_nodes, self.seen)
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
                await asyncio.wait([self._next_reading()], timeout=left)
            return True
        finally:
            self._waiting -= 1

    async def lost(self, node_ids: Collection[str]) -> str:
        """Wait until a reading shows one of these nodes no more: which. Hurries nobody."""
        while True:
            if missing := [each for each in node_ids if self.seen.gone(each)]:
                return min(missing)
            await asyncio.wait([self._next_reading()])

    def _next_reading(self) -> asyncio.Future[None]:
        """Done when the next reading is there. One for all who wait: it must not be cancelled."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        return self._next

    def _report(self, seen: Seen) -> None:
        now = self._clock()
        for node_id in sorted(self._known.keys() | self._expected):
            if seen.gone(node_id):
                self._post(NodeLost(now, node_id))
                self._foreign.pop(node_id, None)
                self._unconfirmed.pop(node_id, None)
        self._expected &= seen.unheard
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
            max(
                0,
                node.gpu_units - node.free_gpu_units - sum(each[0] for each in ours) - self._kept(node.id),
            ),
            max(0, node.cpu_milli - node.free_cpu_milli - sum(each[1] for each in ours)),
            max(0, node.memory_bytes - node.free_memory_bytes - sum(each[2] for each in ours)),
        )


def _identity(node: SeenNode | None) -> tuple[object, ...] | None:
    if node is None:
        return None
    return node.name, node.gpu_units, node.cpu_milli, node.memory_bytes, node.labels


def read_nodes(before: Seen | None = None) -> Seen:
    """One reading of all alive nodes. Blocks for some milliseconds, and for as long as the GCS is away.

    `before`: where nodes that are not heard are taken from. Raises RuntimeError for a table that can't be true.
    """
    at = time.monotonic()
    alive = {str(node["NodeID"]): node for node in ray.nodes() if node["Alive"]}
    here = ray.get_runtime_context().get_node_id()
    if here not in alive:
        # We live, so the node does: this GCS has lost its tables. What it does not list need not be gone.
        raise RuntimeError(
            f"Ray lists {len(alive)} live nodes, and the one that asks ({here}) is none of them"
        )
    reports = _reports()
    unheard = alive.keys() - reports.keys()
    seen = {
        node_id: _seen(node_id, alive[node_id], reports[node_id]) for node_id in alive.keys() & reports.keys()
    }
    for node_id in unheard & (before.nodes.keys() if before else set()):
        assert before is not None
        seen[node_id] = before.nodes[node_id]
    return Seen(at, seen, frozenset(unheard))


def _reports() -> dict[str, ResourcesData]:
    """What each raylet last said of itself: free and total in one message. A node that has not spoken is left out."""
    batch = state._connect_and_get_accessor().get_all_resource_usage()
    found = ResourceUsageBatchData.FromString(batch).batch if batch else ()
    return {each.node_id.hex(): each for each in found if each.resources_total}


def _seen(node_id: str, node: dict[str, object], report: ResourcesData) -> SeenNode:
    resources: dict[str, float] = node["Resources"]  # type: ignore[assignment]
    labels: dict[str, str] = node["Labels"]  # type: ignore[assignment]
    free = report.resources_available
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
        groups=_groups(report.resources_total),
        own_resource=next((key for key in sorted(resources) if _OWN.match(key)), ""),
    )


def _groups(resources: Mapping[str, float]) -> dict[str, Amounts]:
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
