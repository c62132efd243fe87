"""Groups that keep idle nodes from going away: Ray's autoscaler takes none on which anything is used.

What the scheduler keeps on an idle node for a job that comes first is free as far as Ray can tell. So the autoscaler
would take the node, the next job would have it launched again, and so on. A *stay* is a placement group pinned to the
node that uses a thousandth of the resource by which Ray names each node, of which nobody wants more than that: no GPU,
no CPU, no memory. The core says which nodes are to stay (`Wanted.stay`), and a node that is no longer among them has
its stay removed at once, so that it is idle from then on like any other.

Stays are named `rm/<ledger key>/stay/…` and are not detached: Ray removes them when the allocator's process has died. A
restart makes them anew where they are wanted; whatever is left is removed then like any group without an attempt.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ray.util.placement_group import PlacementGroup, placement_group

from rm.runtime.group_removal import all_of, remove_group
from rm.runtime.nodes import Seen

log = logging.getLogger("rm.stays")

LOOK_S = 5.0
"""Between two looks whether the stays are still there; somebody may have removed one."""
_LEAST = 0.001


@dataclass(slots=True)
class _Stay:
    node_id: str
    handle: PlacementGroup
    since: float


class Stays:
    """Those of one allocator, one for each node. `seen()`: the last reading of the nodes."""

    def __init__(self, ledger_key: str, *, seen: Callable[[], Seen]) -> None:
        self._prefix = f"rm/{ledger_key}/stay/"
        self._seen = seen
        self._wanted: frozenset[str] = frozenset()
        self._stays: dict[str, _Stay] = {}
        self._gone: dict[str, float] = {}
        """Groups that are removed, by id, and since when: they may still be seen."""
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._closed = False

    def groups(self) -> frozenset[str]:
        """Ray's ids of the groups that are there, or on their way out."""
        return frozenset((*self._stays, *self._gone))

    def want(self, node_ids: Iterable[str]) -> None:
        """The nodes that must not go away from now on, and no others."""
        wanted = frozenset(node_ids)
        if wanted != self._wanted and not self._closed:
            self._wanted = wanted
            self._changed.set()

    async def run(self) -> None:
        """Keep the groups as they are wanted. What fails is logged and tried again."""
        while True:
            busy = self._wanted or self._stays or self._gone
            try:
                await asyncio.wait_for(self._changed.wait(), LOOK_S if busy else None)
            except TimeoutError:
                pass
            self._changed.clear()
            try:
                await self.reconcile()
            except Exception:
                log.warning("keeping idle nodes failed; it will be tried again", exc_info=True)
                self._changed.set()
                await asyncio.sleep(1)

    async def reconcile(self) -> None:
        """Remove the stays of nodes that may go, or that Ray has lost; make those that are missing."""
        async with self._turn:
            seen = self._seen()
            self._gone = {
                group_id: since for group_id, since in self._gone.items() if seen.at <= since + LOOK_S
            }
            over: list[str] = []
            for group_id, stay in self._stays.items():
                lost = seen.at > stay.since + LOOK_S and seen.lacks(group_id, stay.node_id)
                if lost or stay.node_id not in self._wanted:
                    over.append(group_id)
            await all_of(map(self._remove, over))
            there = {stay.node_id for stay in self._stays.values()}
            for node_id in sorted(self._wanted - there):
                await self._make(node_id, seen)

    async def close(self) -> None:
        """Every node may go."""
        self._closed, self._wanted = True, frozenset()
        await self.reconcile()

    async def _remove(self, group_id: str) -> None:
        await remove_group(self._stays[group_id].handle)
        del self._stays[group_id]
        self._gone[group_id] = time.monotonic()

    async def _make(self, node_id: str, seen: Seen) -> None:
        node = seen.nodes.get(node_id)
        if node is None or not node.own_resource:
            return
        handle = await asyncio.to_thread(
            placement_group,
            [{node.own_resource: _LEAST}],
            name=self._prefix + uuid.uuid4().hex[:12],
            bundle_label_selector=[{"ray.io/node-id": node_id}],
        )
        self._stays[handle.id.hex()] = _Stay(node_id, handle, time.monotonic())
