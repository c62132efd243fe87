"""Where a gang goes: best fit, whole or not at all.

Best fit keeps whole nodes whole, so that big gangs find room and idle nodes can go away. `place` is the only
fit function: the cycle plans with it and the submission check asks it about empty nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from rm.core.model import Gang, Node, NodeShape, PlacedBundle, Strategy
from rm.core.resources import Devices
from rm.core.state import usable


@dataclass(frozen=True, slots=True)
class Room:
    """What a node can still give: the working copy that a trial placement takes from."""

    node_id: str
    devices: Devices
    cpu_milli: int
    memory_bytes: int

    def copies(self, gang: Gang) -> int:
        """How many bundles of `gang` fit here at once."""
        bundle = gang.bundle
        fits = self.devices.copies(bundle.gpu_units)
        if bundle.cpu_milli:
            fits = min(fits, self.cpu_milli // bundle.cpu_milli)
        if bundle.memory_bytes:
            fits = min(fits, self.memory_bytes // bundle.memory_bytes)
        return max(0, fits)

    def take(self, gang: Gang) -> tuple[PlacedBundle, Room]:
        slots, devices = self.devices.take(gang.bundle.gpu_units)
        left = replace(
            self,
            devices=devices,
            cpu_milli=self.cpu_milli - gang.bundle.cpu_milli,
            memory_bytes=self.memory_bytes - gang.bundle.memory_bytes,
        )
        return PlacedBundle(self.node_id, slots), left


def matches(gang: Gang, labels: Iterable[tuple[str, str]]) -> bool:
    """Whether a node with these labels may hold the gang's bundles at all."""
    have = dict(labels)
    if gang.gpu_types and have.get("ray.io/accelerator-type") not in gang.gpu_types:
        return False
    return all(have.get(key) == value for key, value in gang.labels)


def room(node: Node) -> Room:
    return Room(
        node.id,
        usable(node),
        node.cpu_free_milli - node.foreign_cpu_milli,
        node.memory_free_bytes - node.foreign_memory_bytes,
    )


def place(gang: Gang, rooms: Mapping[str, Room]) -> tuple[PlacedBundle, ...] | None:
    """The places of all `gang.count` bundles on `rooms` (already filtered by `matches`), or None.

    Bundles come back in order, those of one node side by side, so that neighbouring ranks are neighbours.
    """
    chosen: list[PlacedBundle] = []
    left = {node_id: (each, fits) for node_id, each in rooms.items() if (fits := each.copies(gang))}
    used: set[str] = set()
    while len(chosen) < gang.count:
        missing = gang.count - len(chosen)
        node_id = _CHOOSE[gang.strategy](left, missing, used)
        if node_id is None:
            return None
        here, fits = left[node_id]
        take = min(missing, fits) if gang.strategy in (Strategy.PACK, Strategy.STRICT_PACK) else 1
        for _ in range(take):
            placed, here = here.take(gang)
            chosen.append(placed)
        used.add(node_id)
        left.pop(node_id)
        if again := here.copies(gang):
            left[node_id] = (here, again)
    return tuple(chosen)


def feasible(gang: Gang, shapes: Iterable[NodeShape]) -> bool:
    """Whether the gang would fit on empty nodes of these shapes, as many of each as there can be."""
    rooms: dict[str, Room] = {}
    for number, shape in enumerate(shapes):
        if matches(gang, shape.labels):
            for copy in range(min(shape.most, gang.count)):
                node_id = f"{number}/{copy}"
                empty = Devices.whole(shape.gpu_slots)
                rooms[node_id] = Room(node_id, empty, shape.cpu_milli, shape.memory_bytes)
    return place(gang, rooms) is not None


_Rooms = Mapping[str, tuple[Room, int]]


def _pack(left: _Rooms, missing: int, _used: set[str]) -> str | None:
    """The node that takes most of what is missing; among equals the one with the least left over."""
    return _first(left, lambda r, fits: (-min(fits, missing), r.devices.total_free))


def _strict_pack(left: _Rooms, missing: int, _used: set[str]) -> str | None:
    whole = {node_id: entry for node_id, entry in left.items() if entry[1] >= missing}
    return _first(whole, lambda r, _: (r.devices.total_free,))


def _spread(left: _Rooms, _missing: int, used: set[str]) -> str | None:
    """A node not used yet, the fullest that fits; used ones only when none is left."""
    return _first(left, lambda r, _: (r.node_id in used, r.devices.total_free))


def _strict_spread(left: _Rooms, missing: int, used: set[str]) -> str | None:
    return _spread({k: v for k, v in left.items() if k not in used}, missing, used)


def _first(left: _Rooms, key: Callable[[Room, int], tuple[object, ...]]) -> str | None:
    """The best node by `key`; node ids break ties so that the same state gives the same plan."""
    return min(left, key=lambda node_id: (*key(*left[node_id]), node_id), default=None)


_CHOOSE: dict[Strategy, Callable[[_Rooms, int, set[str]], str | None]] = {
    Strategy.PACK: _pack,
    Strategy.STRICT_PACK: _strict_pack,
    Strategy.SPREAD: _spread,
    Strategy.STRICT_SPREAD: _strict_spread,
}
