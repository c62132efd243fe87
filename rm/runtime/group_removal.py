"""Removing a placement group so that what it holds is really given back.

Ray makes a group in two steps: each node sets its bundles' resources aside, then all of them are committed. A group
that is removed just between the two is forgotten by the GCS and not by the node (Ray 2.60; 14 of 200 groups that were
removed at once, none of those that had been committed; ray-project/ray#64693 tells of a related case). The GPUs count
as used there until the node ends, and no group in any table says by whom.

So a group that is being made is let be until it is made, or until Ray itself waits: for room, or for a node. That takes
some milliseconds. Ray tries again what waits, so where no commit was seen the nodes are told as well, in the GCS's own
words, to give back what they may have set aside. They ignore what they don't know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Collection, Iterable
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.node_manager_pb2 import RemovePlacementGroupBundlesRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

log = logging.getLogger("rm.group_removal")

SETTLES_S = 5.0
"""How long a group may be on its way. The GCS makes one after the other."""
FLIGHT_S = 0.25
"""Within this time a node has heard what the GCS said before the removal."""
NODE_S = 5.0
"""How long a node may take to answer."""
_FIRST_LOOK_S = 0.001
_LOOK_S = 0.05
_WAITS = frozenset({"NO_RESOURCES", "INFEASIBLE"})


async def remove_group(group: PlacementGroup, *, committed: bool = False) -> None:
    """Ask Ray to remove the group, once it is made or waits. `committed`: it was seen made, which saves looking.

    Returns when Ray has been asked; its resources are back a moment later. Raises what Ray's own call raises.
    """
    bundles = [] if committed else await _uncommitted(group)
    await asyncio.to_thread(remove_placement_group, group)
    if bundles:
        await asyncio.sleep(FLIGHT_S)
        await asyncio.to_thread(take_back, group.id.binary(), bundles)


async def all_of(removals: Iterable[Awaitable[object]]) -> None:
    """Wait for all, at once. Raises what went wrong first when all have been tried: none is given up for another."""
    for each in await asyncio.gather(*removals, return_exceptions=True):
        if isinstance(each, BaseException):
            raise each


async def _uncommitted(group: PlacementGroup) -> Collection[int]:
    """Look until the group is made, waits, or is gone. Returns the indexes of its bundles, none where it is made.

    One that is removed already may have been so by a call of ours that came no further.
    """
    deadline, pause_s = time.monotonic() + SETTLES_S, _FIRST_LOOK_S
    while True:
        entry: dict[str, Any] = await asyncio.to_thread(placement_group_table, group)
        if not entry or entry["state"] == "CREATED":
            return ()
        over = entry["state"] == "REMOVED" or entry["stats"]["scheduling_state"] in _WAITS
        if over or time.monotonic() > deadline:
            return tuple(entry["bundles"])
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LOOK_S)


def take_back(group_id: bytes, bundles: Collection[int]) -> None:
    """Tell every live node to give back what it has set aside for these bundles of a removed group. Blocks.

    All nodes are asked at once, and NODE_S is the most that it takes. One that can't be asked is logged: it is on its
    way out, or its GPUs show as used by others from now on.
    """
    request = RemovePlacementGroupBundlesRequest(placement_group_id=group_id)
    for index in bundles:
        bundle = request.bundle_specs.add().bundle_id
        bundle.placement_group_id, bundle.bundle_index = group_id, index
    with contextlib.ExitStack() as channels:
        asked = []
        for node in ray.nodes():
            if node["Alive"]:
                address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
                stub = NodeManagerServiceStub(channels.enter_context(init_grpc_channel(address)))
                asked.append((address, stub.RemovePlacementGroupBundles.future(request, timeout=NODE_S)))
        for address, answer in asked:
            try:
                answer.result()
            except grpc.RpcError:
                log.warning(
                    "%s was not told that group %s is removed", address, group_id.hex(), exc_info=True
                )
