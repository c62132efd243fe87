"""How the autoscaler is asked for nodes: pending placement groups that it sees, one for each `Ask`.

A group has one bundle for each new node, as large as the node, with the labels of its type; and one for what is kept on
nodes that are up, pinned to them, so that they don't go away as idle meanwhile. No bundle for a new node may lie on one
that is known already: otherwise Ray would place it on GPUs that our plan wants for others, and nobody would launch
anything. So the group is placed only when new nodes join. It is seen then, and removed: as soon as the state knows the
nodes too, the job has them by its plan. Until that moment it counts as asked for, or a second node would be launched.

The groups are named `rm/<ledger key>/want/…` and hold nothing that counts: what they have on a node is free for us.
After a restart they are removed like any group without an attempt, and asked for anew.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group

from rm.core.launches import NOTHING_WANTED, Ask, Wanted
from rm.core.resources import GPU_UNIT
from rm.runtime.autoscaler import LaunchType
from rm.runtime.group_removal import all_of, remove_group
from rm.runtime.nodes import Seen

log = logging.getLogger("rm.asks")

LOOK_S = 0.5
"""Between two looks at what became of groups."""
MOST_NAMED = 500
"""Known nodes that a bundle names as not meant; on a larger cluster those with room for it."""
_LEAST = 0.001
"""Of the resource by which Ray marks a GPU type: any amount will do."""
Spec = tuple[tuple[str, ...], tuple[tuple[str, int], ...]]


@dataclass(slots=True)
class _Group:
    spec: Spec
    handle: PlacementGroup


class Asks:
    """The pending groups of one allocator. `seen()`: the last reading of the nodes; `known()`: those of the state."""

    def __init__(
        self,
        ledger_key: str,
        *,
        seen: Callable[[], Seen],
        known: Callable[[], Collection[str]],
        types: Callable[[], Mapping[str, LaunchType]],
    ) -> None:
        self._prefix = f"rm/{ledger_key}/want/"
        self._seen = seen
        self._known = known
        self._types = types
        self._wanted = NOTHING_WANTED
        self._groups: dict[str, _Group] = {}
        self._gone: dict[str, _Group] = {}
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._closed = False

    def ours(self, group_id: str) -> bool:
        """Whether it is one of these groups, or was one and may still be seen."""
        return group_id in self._groups or group_id in self._gone

    def want(self, wanted: Wanted) -> None:
        """What is wanted from now on. The state's nodes are as they were when that was decided."""
        if wanted is not self._wanted and not self._closed:
            self._wanted = wanted
            self._changed.set()

    @property
    def busy(self) -> bool:
        return bool(self._wanted.asks or self._groups)

    async def run(self) -> None:
        """Keep the groups as they are wanted. What fails is logged and tried again."""
        while True:
            try:
                await asyncio.wait_for(self._changed.wait(), LOOK_S if self.busy or self._gone else None)
            except TimeoutError:
                pass
            self._changed.clear()
            try:
                await self.reconcile()
            except Exception:
                log.warning("asking for nodes failed; it will be tried again", exc_info=True)
                self._changed.set()
                await asyncio.sleep(LOOK_S)

    async def reconcile(self) -> None:
        """Remove what is not wanted or has been fulfilled, make what is missing."""
        async with self._turn:
            seen, known = self._seen(), self._known()
            missing = Counter(spec_of(ask) for ask in self._wanted.asks)
            over: list[str] = []
            for group_id, group in self._groups.items():
                where = {node_id for node_id, node in seen.nodes.items() if group_id in node.groups}
                if not (where and where <= set(known)) and missing[group.spec]:
                    missing[group.spec] -= 1
                else:
                    over.append(group_id)
            await all_of(map(self._remove, over))
            for group_id in list(self._gone):
                if not any(group_id in node.groups for node in seen.nodes.values()):
                    del self._gone[group_id]
            for spec in sorted(missing.elements()):
                await self._create(spec, seen)

    async def close(self) -> None:
        """Ask for nothing more."""
        self._closed, self._wanted = True, NOTHING_WANTED
        await self.reconcile()

    async def _remove(self, group_id: str) -> None:
        await remove_group(self._groups[group_id].handle)
        self._gone[group_id] = self._groups.pop(group_id)

    async def _create(self, spec: Spec, seen: Seen) -> None:
        types = self._types()
        if any(name not in types for name in spec[0]):
            return  # the types have just changed: what is wanted will follow
        bundles, selectors = request(spec, types, seen)
        handle = await asyncio.to_thread(
            placement_group,
            bundles,
            strategy="PACK",
            name=self._prefix + uuid.uuid4().hex[:12],
            lifetime="detached",
            bundle_label_selector=selectors,
        )
        self._groups[handle.id.hex()] = _Group(spec, handle)


def spec_of(ask: Ask) -> Spec:
    """What of an ask Ray is told: for whom it is may change meanwhile."""
    return ask.node_types, ask.kept


def request(
    spec: Spec, types: Mapping[str, LaunchType], seen: Seen
) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """The bundles of a group, and each one's label selector."""
    bundles: list[dict[str, float]] = []
    selectors: list[dict[str, str]] = []
    for name in spec[0]:
        launch_type = types[name]
        bundle: dict[str, float] = {"GPU": launch_type.shape.gpu_slots}
        if launch_type.accelerator:
            bundle[launch_type.accelerator] = _LEAST
        if _has_a_double(launch_type, types.values()) and launch_type.shape.cpu_milli:
            bundle["CPU"] = launch_type.shape.cpu_milli / 1000
        bundles.append(bundle)
        others = _not_meant(launch_type, seen)
        selectors.append(
            {**launch_type.labels, **({"ray.io/node-id": f"!in({','.join(others)})"} if others else {})}
        )
    for node_id, units in spec[1]:
        bundles.append({"GPU": -(-units // GPU_UNIT) if units > GPU_UNIT else units / GPU_UNIT})
        selectors.append({"ray.io/node-id": node_id})
    return bundles, selectors


def _has_a_double(launch_type: LaunchType, types: Iterable[LaunchType]) -> bool:
    """Whether another type differs in CPUs and memory alone."""
    mine = launch_type.shape
    return any(
        each.shape.name != mine.name
        and each.shape.gpu_slots == mine.gpu_slots
        and each.labels == launch_type.labels
        for each in types
    )


def _not_meant(launch_type: LaunchType, seen: Seen) -> list[str]:
    """The nodes that are up and that Ray might otherwise place the bundle on."""
    units = launch_type.shape.gpu_slots * GPU_UNIT
    large: list[Any] = [node for node in seen.nodes.values() if node.gpu_units >= units]
    if len(large) > MOST_NAMED:
        large = [node for node in large if node.free_gpu_units >= units][:MOST_NAMED]
    return sorted(node.id for node in large)
