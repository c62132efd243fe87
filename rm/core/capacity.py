"""The nodes and what is free on them, indexed for best fit; with checkpoint and rollback for what-if.

Nodes with as many GPUs and the same labels form a *class*: few even on a large cluster, and a request matches
a class or does not (CPUs and memory differ from node to node and are looked at one by one). Inside a class nodes
lie in buckets by how many whole devices are free, and devices that are partly used by how much of them is. So the
fullest node that still fits is found without looking at the others. In a bucket those come last that an autoscaler
takes away when they are idle. Every change of a node goes through `_put`,
which keeps the index, the totals and, inside a trial, the way back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from rm.core.model import GPU_TYPE, Gang, Node, NodeShape, PlacedBundle
from rm.core.records import replace
from rm.core.resources import GPU_UNIT, Amount, Bundle, Devices

MEMORY_STEP = 2**28
"""Shapes count memory in steps: machines of one type differ by a few bytes."""
RETURNABLE = 1 << 40
"""From here on are the numbers of the nodes that an autoscaler takes away when they are idle."""
_OWN_LABELS = frozenset({"ray.io/node-id"})


@dataclass(frozen=True, slots=True)
class Totals:
    """GPUs of the whole cluster in units: charged + foreign + free = capacity, up to nodes that just left.

    What is idle on cordoned nodes, or in quarantine, counts as foreign: nobody gets it.
    """

    capacity: int
    charged: int
    foreign: int
    free: int


@dataclass(frozen=True, slots=True)
class ClassKey:
    """What the nodes of a class have in common."""

    gpu_slots: int
    labels: tuple[tuple[str, str], ...]

    @property
    def gpu_type(self) -> str | None:
        return dict(self.labels).get(GPU_TYPE)


class NodeClass:
    """The nodes of one class, by number: `whole[k]` has those with k whole devices free, in ascending order."""

    __slots__ = ("cordoned", "free_units", "key", "partial", "quarantined", "size", "whole")

    def __init__(self, key: ClassKey) -> None:
        self.key = key
        self.whole: list[list[int]] = [[] for _ in range(key.gpu_slots + 1)]
        self.partial: dict[int, list[int]] = {}
        """Free units of a partly used device → nodes that have such a device."""
        self.size = 0
        self.cordoned = 0
        """How many of its nodes are cordoned. They count as having nothing free."""
        self.free_units = 0
        self.quarantined = 0
        """Units that nobody of ours has and nobody gets, because strays are on them. Without cordoned nodes."""

    def copies(self, gpus: int) -> int:
        """How many bundles of `gpus` whole devices fit on the class at once."""
        return sum(len(nodes) * (free // gpus) for free, nodes in enumerate(self.whole) if free >= gpus)

    def staying(self, free: int) -> int:
        """How many of the first nodes in `whole[free]` stay whatever is placed there. There must be some.

        Nobody takes them away, or somebody has GPUs there already.
        """
        nodes = self.whole[free]
        if free < self.key.gpu_slots or nodes[-1] < RETURNABLE:
            return len(nodes)
        return bisect_left(nodes, RETURNABLE)


def matches(gang: Gang, labels: Iterable[tuple[str, str]]) -> bool:
    """Whether a node with these labels may hold the gang's bundles at all."""
    have = dict(labels)
    if gang.gpu_types and have.get(GPU_TYPE) not in gang.gpu_types:
        return False
    return all(have.get(key) == value for key, value in gang.labels)


def usable(node: Node) -> Devices:
    """What is free on the node for us: after our own charges and after what strangers hold; nothing if cordoned."""
    if node.cordoned:
        return Devices.none(node.gpu_slots)
    return node.devices.without_foreign(node.foreign_units) if node.foreign_units else node.devices


def foreign(node: Node) -> Amount:
    """What strangers hold on the node; during a trial also what is kept free for others."""
    return Amount(node.foreign_units, node.foreign_cpu_milli, node.foreign_memory_bytes)


class Capacity:
    """All nodes. `ClusterState` changes it by events; the cycle tries things out between `mark` and `rollback`."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._numbers: dict[str, int] = {}
        self._ids: dict[int, str] = {}
        self._next = 0
        self._class_of: dict[str, NodeClass] = {}
        self.classes: dict[ClassKey, NodeClass] = {}
        self._journal: list[Node] = []
        self._trials = 0
        self._matching: dict[Gang, tuple[NodeClass, ...]] = {}
        self._total = self._charged = self._free = 0
        self.class_version = 0
        """Grows when a class comes or goes."""
        self._shapes: dict[bool, tuple[NodeShape, ...]] = {}
        self.shape_version = 0
        """Grows when nodes come or go, or are cordoned or not: what is feasible depends on nothing else."""

    # --- reading -------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Mapping[str, Node]:
        return MappingProxyType(self._nodes)

    def __getitem__(self, node_id: str) -> Node:
        return self._nodes[node_id]

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def node_numbered(self, number: int) -> Node:
        return self._nodes[self._ids[number]]

    def totals(self) -> Totals:
        foreign = self._total - self._charged - self._free
        return Totals(self._total, self._charged, foreign, self._free)

    @property
    def free_units(self) -> int:
        """GPU units that are free on all nodes together."""
        return self._free

    def class_of(self, node_id: str) -> NodeClass:
        return self._class_of[node_id]

    def matching(self, gang: Gang) -> tuple[NodeClass, ...]:
        """The classes whose nodes may hold the gang, empty or not."""
        found = self._matching.get(gang)
        if found is None:
            if len(self._matching) > 10_000:
                self._matching.clear()
            found = tuple(
                each
                for each in self.classes.values()
                if each.key.gpu_slots and matches(gang, each.key.labels)
            )
            self._matching[gang] = found
        return found

    def shapes(self, *, with_cordoned: bool = True) -> tuple[NodeShape, ...]:
        """The shapes of the nodes that are up, and how many there are of each."""
        if with_cordoned not in self._shapes:
            counts: dict[NodeShape, int] = {}
            for node in self._nodes.values():
                if node.cordoned and not with_cordoned:
                    continue
                memory = node.memory_bytes - node.memory_bytes % MEMORY_STEP
                shape = NodeShape(node.gpu_slots, node.cpu_milli, memory, self._class_of[node.id].key.labels)
                counts[shape] = counts.get(shape, 0) + 1
            self._shapes[with_cordoned] = tuple(replace(shape, most=count) for shape, count in counts.items())
        return self._shapes[with_cordoned]

    def open_nodes(self) -> int:
        """How many nodes with GPUs are not cordoned."""
        return sum(each.size - each.cordoned for key, each in self.classes.items() if key.gpu_slots)

    def by_type(self) -> dict[str, int]:
        """GPU units of the nodes that are up, by GPU type ("" where a node has none)."""
        units: dict[str, int] = {}
        for key, each in self.classes.items():
            kind = key.gpu_type or ""
            units[kind] = units.get(kind, 0) + key.gpu_slots * each.size * GPU_UNIT
        return units

    def copies_on(self, node: Node, bundle: Bundle) -> int:
        """How many bundles fit on the node now."""
        return copies_in(
            bundle,
            usable(node),
            node.cpu_free_milli - node.foreign_cpu_milli,
            node.memory_free_bytes - node.foreign_memory_bytes,
        )

    # --- changing --------------------------------------------------------------------------------------------

    def join(self, node: Node) -> None:
        """Add a node, or replace the one of its id."""
        if node.id in self._nodes:
            self.leave(node.id)
        number = self._number(node)
        key = _class_key(node)
        group = self.classes.get(key)
        if group is None:
            group = self.classes[key] = NodeClass(key)
            self.class_version += 1
            self._matching.clear()
        group.size += 1
        self._shapes_changed()
        self._class_of[node.id] = group
        self._nodes[node.id] = node
        self._total += node.gpu_slots * GPU_UNIT
        self._index(node, number, group, +1)

    def _number(self, node: Node) -> int:
        number = self._numbers[node.id] = self._next + (RETURNABLE if node.returnable else 0)
        self._next += 1
        self._ids[number] = node.id
        return number

    def mark_returnable(self, node_id: str, returnable: bool) -> None:
        """Note of a node that is there whether an autoscaler takes it away when it is idle. Not inside a trial."""
        old, group = self._nodes[node_id], self._class_of[node_id]
        number = self._numbers[node_id]
        self._index(old, number, group, -1)
        del self._ids[number]
        new = self._nodes[node_id] = replace(old, returnable=returnable)
        self._index(new, self._number(new), group, +1)

    def leave(self, node_id: str) -> Node | None:
        node = self._nodes.pop(node_id, None)
        if node is None:
            return None
        number, group = self._numbers.pop(node_id), self._class_of.pop(node_id)
        del self._ids[number]
        self._index(node, number, group, -1)
        self._total -= node.gpu_slots * GPU_UNIT
        group.size -= 1
        self._shapes_changed()
        if not group.size:
            del self.classes[group.key]
            self.class_version += 1
            self._matching.clear()
        return node

    def take(self, bundle: Bundle, placed: Iterable[PlacedBundle]) -> None:
        """Charge bundles to their nodes. Nodes that are gone are passed over."""
        self._move(bundle, placed, +1)

    def give(self, bundle: Bundle, placed: Iterable[PlacedBundle]) -> None:
        """The inverse of `take`."""
        self._move(bundle, placed, -1)

    def keep_free(self, node_id: str, amount: Amount) -> None:
        """Inside a trial: make so much of what is free unavailable, whole devices first; a negative amount undoes."""
        node = self._nodes.get(node_id)
        if node is not None and amount:
            self._put(
                replace(
                    node,
                    foreign_units=node.foreign_units + amount.gpu_units,
                    foreign_cpu_milli=node.foreign_cpu_milli + amount.cpu_milli,
                    foreign_memory_bytes=node.foreign_memory_bytes + amount.memory_bytes,
                )
            )

    def replace(self, node: Node) -> None:
        """Put another record of a node that is there: same class, other amounts."""
        self._put(node)

    def cordon(self, node_id: str, cordoned: bool) -> None:
        """Take a node that is there out of what can be given, or put it back."""
        self._put(replace(self._nodes[node_id], cordoned=cordoned))
        self._shapes_changed()

    def _shapes_changed(self) -> None:
        self.shape_version += 1
        self._shapes = {}

    def _move(self, bundle: Bundle, placed: Iterable[PlacedBundle], sign: int) -> None:
        for each in placed:
            node = self._nodes.get(each.node_id)
            if node is not None:
                self._put(charged(node, bundle, each.slots, sign))

    # --- what if -----------------------------------------------------------------------------------------------

    def mark(self) -> int:
        """Begin a trial, or a trial inside one. `rollback(mark)` undoes everything since."""
        self._trials += 1
        return len(self._journal)

    def rollback(self, mark: int) -> None:
        # Of each node only what it was first: what a trial made of it in between need not be seen again.
        before = {node.id: node for node in reversed(self._journal[mark:])}
        del self._journal[mark:]
        for node in before.values():
            self._set(node)
        self._trials -= 1

    @contextmanager
    def imagined(self, nodes: Iterable[Node]) -> Iterator[tuple[NodeClass, ...]]:
        """As if these nodes were there, for whoever looks at the classes that are given. Nobody else finds them."""
        before, classes = self._next, dict[ClassKey, NodeClass]()
        ids = []
        for node in nodes:
            group = self._class_of[node.id] = classes.setdefault(
                _class_key(node), NodeClass(_class_key(node))
            )
            self._nodes[node.id] = node
            self._index(node, self._number(node), group, +1)
            ids.append(node.id)
        try:
            yield tuple(classes.values())
        finally:
            for node_id in ids:
                number = self._numbers.pop(node_id)
                self._index(self._nodes.pop(node_id), number, self._class_of.pop(node_id), -1)
                del self._ids[number]
            self._next = before

    # --- index -------------------------------------------------------------------------------------------------

    def _put(self, node: Node) -> None:
        if self._trials:
            self._journal.append(self._nodes[node.id])
        self._set(node)

    def _set(self, node: Node) -> None:
        number, group = self._numbers[node.id], self._class_of[node.id]
        self._index(self._nodes[node.id], number, group, -1)
        self._nodes[node.id] = node
        self._index(node, number, group, +1)

    def _index(self, node: Node, number: int, group: NodeClass, sign: int) -> None:
        devices = usable(node)
        total, whole, parts = _counted(devices.free)
        idle = total if devices is node.devices else _counted(node.devices.free)[0]
        change = insort if sign > 0 else _remove
        change(group.whole[whole], number)
        for part in parts:
            nodes = group.partial.setdefault(part, [])
            change(nodes, number)
            if not nodes:
                del group.partial[part]
        group.free_units += sign * total
        group.cordoned += sign * node.cordoned
        if node.quarantined_units and not node.cordoned:
            group.quarantined += sign * min(node.quarantined_units, node.devices.total_free)
        self._free += sign * total
        self._charged += sign * (node.gpu_slots * GPU_UNIT - idle)

    def check(self) -> None:
        """The index and the totals, worked out again from the nodes. AssertionError where they differ."""
        fresh = Capacity()
        for node_id in sorted(self._nodes, key=self._numbers.__getitem__):
            fresh.join(self._nodes[node_id])
        assert not self._trials, "a trial was not rolled back"
        assert fresh.totals() == self.totals(), f"totals {self.totals()} are not {fresh.totals()}"
        assert set(fresh.classes) == set(self.classes), "classes"
        for key, group in self.classes.items():
            again = fresh.classes[key]
            names = [[self._ids[n] for n in bucket] for bucket in group.whole]
            assert names == [[fresh._ids[n] for n in bucket] for bucket in again.whole], f"buckets of {key}"
            assert {part: len(nodes) for part, nodes in group.partial.items()} == {
                part: len(nodes) for part, nodes in again.partial.items()
            }, f"partial devices of {key}"
            ours = group.size, group.free_units, group.cordoned, group.quarantined
            theirs = again.size, again.free_units, again.cordoned, again.quarantined
            assert ours == theirs, f"sizes of {key}"


@lru_cache(maxsize=65_536)
def _counted(free: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """Units in all, whole devices, and the different amounts that are free on partly used ones."""
    parts = {each for each in free if 0 < each < GPU_UNIT}
    return sum(free), free.count(GPU_UNIT), tuple(parts)


def copies_in(bundle: Bundle, devices: Devices, cpu_milli: int, memory_bytes: int) -> int:
    """How many bundles fit into these free amounts."""
    fits = devices.copies(bundle.gpu_units)
    if bundle.cpu_milli:
        fits = min(fits, cpu_milli // bundle.cpu_milli)
    if bundle.memory_bytes:
        fits = min(fits, memory_bytes // bundle.memory_bytes)
    return max(0, fits)


def charged(node: Node, bundle: Bundle, slots: tuple[int, ...], sign: int) -> Node:
    """The node with one bundle more (+1) or less (-1) on these device slots."""
    move = node.devices.give if sign < 0 else node.devices.take_slots
    return Node(
        node.id,
        node.name,
        node.gpu_slots,
        move(slots, bundle.gpu_units),
        node.cpu_milli,
        node.cpu_free_milli - sign * bundle.cpu_milli,
        node.memory_bytes,
        node.memory_free_bytes - sign * bundle.memory_bytes,
        node.labels,
        node.foreign_units,
        node.foreign_cpu_milli,
        node.foreign_memory_bytes,
        node.cordoned,
        node.quarantined_units,
        node.returnable,
    )


def _class_key(node: Node) -> ClassKey:
    labels = tuple(pair for pair in node.labels if pair[0] not in _OWN_LABELS)
    return ClassKey(node.gpu_slots, labels)


def _remove(numbers: list[int], number: int) -> None:
    index = bisect_left(numbers, number)
    assert numbers[index] == number, "the index lost a node"
    del numbers[index]
