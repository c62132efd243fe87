"""Placement groups: made, found again, removed. The port between a plan's places and Ray's.

A group is named `rm/<ledger key>/<attempt>`, detached, and every bundle is pinned to its node, so that what Ray
does is what the plan says. It keeps the name of the attempt that it was made for when another takes it over. Groups of
another ledger on the same cluster are not ours and are never touched.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from rm.core.model import Gang, PlacedBundle
from rm.core.resources import GPU_UNIT, Bundle
from rm.runtime.group_removal import remove_group

log = logging.getLogger("rm.placements")


class Placements:
    """The groups of one ledger, by attempt key."""

    def __init__(self, ledger_key: str) -> None:
        self._prefix = f"rm/{ledger_key}/"
        self._groups: dict[str, PlacementGroup] = {}
        self._ids: dict[str, str] = {}
        self._names: dict[str, str] = {}
        """Attempts that have a group of another name."""
        self._committed: set[str] = set()
        """Ids of groups that were seen made."""

    def ours(self, group_id: str) -> bool:
        return group_id in self._ids

    def group_id(self, attempt: str) -> str | None:
        """Ray's hex id of the attempt's group, if it has one."""
        group = self._groups.get(attempt)
        return group.id.hex() if group else None

    def handle(self, attempt: str) -> PlacementGroup | None:
        """The attempt's group as Ray's API wants it."""
        return self._groups.get(attempt)

    def attempts(self) -> set[str]:
        return set(self._groups)

    def name(self, attempt: str) -> str:
        """The name of the attempt's group: its own, or that of the attempt which the group was made for."""
        return self._names.get(attempt, attempt)

    def holder(self, name: str) -> str:
        """The inverse of `name`: the attempt that has the group of this name."""
        return next((attempt for attempt, other in list(self._names.items()) if other == name), name)

    def hand_over(self, before: str, after: str) -> None:
        """The group of one attempt is another's now. Where there is none, nothing happens."""
        group = self._groups.pop(before, None)
        if group is None:
            return
        self._remember(after, group)
        name = self._names.pop(before, before)
        if name != after:
            self._names[after] = name

    async def find(self) -> None:
        """Learn the groups that exist already: after a restart, before anything is observed or made."""
        table = await asyncio.to_thread(placement_group_table)
        for entry in table.values():
            name = str(entry["name"])
            if name.startswith(self._prefix) and entry["state"] != "REMOVED":
                self._remember(name.removeprefix(self._prefix), _handle(entry))

    async def create(self, attempt: str, gang: Gang, placed: tuple[PlacedBundle, ...]) -> PlacementGroup:
        """Ask Ray for the group. Returns the one that exists already, if any."""
        if attempt not in self._groups:
            making = asyncio.create_task(asyncio.to_thread(self._create, attempt, gang, placed))
            try:
                await asyncio.shield(making)
            finally:
                # Given up or not, Ray makes it: unless it is known, nobody will ever remove it.
                self._remember(attempt, await making)
        return self._groups[attempt]

    def _create(self, attempt: str, gang: Gang, placed: tuple[PlacedBundle, ...]) -> PlacementGroup:
        return placement_group(
            [bundle_resources(gang.bundle)] * gang.count,
            # Every bundle names its node, so this is the one strategy that never contradicts the plan.
            strategy="PACK",
            name=self._prefix + attempt,
            lifetime="detached",
            bundle_label_selector=[{"ray.io/node-id": each.node_id} for each in placed],
        )

    async def ready(self, attempt: str, timeout_s: float) -> bool:
        """Whether the group is committed within `timeout_s`."""
        # Not `wait`: it counts in whole seconds, cuts what is less to nothing, and blocks a thread.
        try:
            # In a thread: of a group that was found again Ray first asks the GCS how many bundles it has.
            committed = await asyncio.to_thread(self._groups[attempt].ready)
            await asyncio.wait_for(committed, timeout_s)
        except TimeoutError:
            return False
        if group := self._groups.get(attempt):
            self._committed.add(group.id.hex())
        return True

    async def remove(self, attempt: str) -> str | None:
        """Ask Ray to remove the group. Returns its id, to be observed; None where there is none.

        Asking is not having: the caller watches the nodes and asks again (`forget` ends it).
        """
        group = self._groups.get(attempt)
        if group is None:
            return None
        group_id = str(group.id.hex())
        try:
            await remove_group(group, committed=group_id in self._committed)
        except Exception:
            log.warning("removing the group of %s failed; it will be tried again", attempt, exc_info=True)
        return group_id

    def look_up(self, group_id: str) -> tuple[str, dict[str, Any]] | None:
        """What Ray's table says of any group: its attempt ("": it is not ours) and the entry. Blocks for a call."""
        entry = placement_group_table(_handle({"placement_group_id": group_id}))
        if not entry:
            return None
        name = str(entry["name"])
        return (name.removeprefix(self._prefix) if name.startswith(self._prefix) else ""), entry

    async def remove_by_id(self, group_id: str) -> None:
        """Ask Ray to remove a group of ours that no attempt owns."""
        if attempt := self._ids.get(group_id):
            self.forget(attempt)
        await remove_group(_handle({"placement_group_id": group_id}))

    def forget(self, attempt: str) -> None:
        """The group was seen gone."""
        group = self._groups.pop(attempt, None)
        self._names.pop(attempt, None)
        if group is not None:
            self._ids.pop(group.id.hex(), None)
            self._committed.discard(group.id.hex())

    def _remember(self, attempt: str, group: PlacementGroup) -> None:
        self._groups[attempt] = group
        self._ids[group.id.hex()] = attempt


def bundle_resources(bundle: Bundle) -> dict[str, float]:
    """The bundle in Ray's words. Amounts of 0 are left out: Ray refuses them."""
    resources: dict[str, float] = {"GPU": bundle.gpu_units / GPU_UNIT}
    if bundle.cpu_milli:
        resources["CPU"] = bundle.cpu_milli / 1000
    if bundle.memory_bytes:
        resources["memory"] = bundle.memory_bytes
    return resources


def _handle(entry: dict[str, Any]) -> PlacementGroup:
    return PlacementGroup(PlacementGroupID(bytes.fromhex(entry["placement_group_id"])))
