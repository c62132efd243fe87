"""Where a gang goes: best fit, whole or not at all.

Best fit keeps whole nodes whole, so that big gangs find room and idle nodes can go away; of nodes that fit as well,
those that would go away if they stayed empty come last. `place` is the only
fit function: the cycle plans with it, `feasible` asks it about empty nodes. It reads the index of
`capacity.Capacity`, so that a bundle costs a look at a few buckets and not at every node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rm.core.capacity import Capacity, NodeClass, matches, usable
from rm.core.model import Gang, Node, NodeShape, PlacedBundle, Strategy
from rm.core.resources import GPU_UNIT, Bundle, Devices

LOOKS_PER_BUCKET = 200
"""How many equally full nodes are asked for CPUs and memory before the next fuller ones are tried."""


def place(
    gang: Gang, capacity: Capacity, classes: Sequence[NodeClass] | None = None
) -> tuple[PlacedBundle, ...] | None:
    """The places of all `gang.count` bundles, or None. `classes`: where to look (default: all that match).

    Bundles come back in order, those of one node side by side, so that neighbouring ranks are neighbours.
    """
    classes = capacity.matching(gang) if classes is None else classes
    if not may_fit(gang, classes):
        return None
    if gang.bundle.gpu_units < GPU_UNIT:
        return _place_shares(gang, capacity, classes)
    if gang.strategy in (Strategy.PACK, Strategy.STRICT_PACK):
        return _pack(gang, capacity, classes)
    return _spread(gang, capacity, classes)


def place_elastic(
    gang: Gang, capacity: Capacity, classes: Sequence[NodeClass] | None = None
) -> tuple[PlacedBundle, ...] | None:
    """As `place`, with as many bundles as fit, from `gang.minimum` to `gang.count`."""
    places = place(gang, capacity, classes)
    if places is not None or gang.minimum == gang.count:
        return places
    low, high, best = gang.minimum, gang.count - 1, None
    while low <= high:
        middle = (low + high) // 2
        places = place(gang.sized(middle), capacity, classes)
        if places is None:
            high = middle - 1
        else:
            low, best = middle + 1, places
    return best


def feasible(gang: Gang, shapes: Iterable[NodeShape]) -> bool:
    """Whether the gang's minimum would fit on empty nodes of these shapes, as many of each as there can be."""
    least = gang.sized(gang.minimum)
    empty = Capacity()
    for number, shape in enumerate(shapes):
        if shape.gpu_slots and matches(gang, shape.labels):
            for copy in range(min(shape.most, least.count)):
                node_id = f"{number}/{copy}"
                empty.join(empty_node(node_id, shape))
    if not gang.gpu_types:
        return place(least, empty) is not None
    return any(
        place(least, empty, [each for each in empty.matching(gang) if each.key.gpu_type == gpu_type])
        is not None
        for gpu_type in gang.gpu_types
    )


def may_fit(gang: Gang, classes: Sequence[NodeClass]) -> bool:
    """Whether the gang's minimum may fit: a cheap bound that never says no where it fits."""
    units = gang.bundle.gpu_units
    if units < GPU_UNIT:
        return any(any(each.whole[1:]) or any(part >= units for part in each.partial) for each in classes)
    gpus = units // GPU_UNIT
    if gang.minimum == 1:
        return any(any(each.whole[gpus:]) for each in classes)
    return sum(each.copies(gpus) for each in classes) >= gang.minimum


def _pack(gang: Gang, capacity: Capacity, classes: Sequence[NodeClass]) -> tuple[PlacedBundle, ...] | None:
    """Node by node: the one that takes most of what is missing, among equals the one with the least left over."""
    strict = gang.strategy is Strategy.STRICT_PACK
    chosen: list[PlacedBundle] = []
    used: set[str] = set()
    while len(chosen) < gang.count:
        missing = gang.count - len(chosen)
        found = _fullest(gang.bundle, missing, capacity, classes, used)
        if found is None:
            return None
        node, fits = found
        if strict and fits < missing:
            return None
        chosen += _bundles(gang.bundle, node, min(missing, fits))
        used.add(node.id)
    return tuple(chosen)


def _fullest(
    bundle: Bundle, missing: int, capacity: Capacity, classes: Sequence[NodeClass], used: set[str]
) -> tuple[Node, int] | None:
    """The node with the fewest free devices that takes `missing` bundles; else one that takes the most."""
    gpus = bundle.gpu_units // GPU_UNIT
    most = max((len(each.whole) - 1 for each in classes), default=0)
    plain = not bundle.cpu_milli and not bundle.memory_bytes
    best: tuple[Node, int] | None = None
    # Ascending from what is enough for all that is missing; below that, descending by how many fit.
    enough = range(min(most + 1, missing * gpus), most + 1)
    fewer = range(min(most, missing * gpus - 1), gpus - 1, -1)
    for free in enough:
        for node in _bucket(free, capacity, classes, used):
            if plain:
                return node, free // gpus
            fits = capacity.copies_on(node, bundle)
            if fits >= missing:
                return node, fits
            if fits and (best is None or fits > best[1]):
                best = node, fits
    for free in fewer:
        copies = free // gpus
        if best is not None and best[1] >= copies and (best[1] > copies or not plain):
            break
        found: tuple[Node, int] | None = None
        for node in _bucket(free, capacity, classes, used):
            fits = copies if plain else capacity.copies_on(node, bundle)
            if fits and (found is None or fits > found[1]):
                found = node, fits
            if plain:
                break
        if found is not None and (best is None or found[1] >= best[1]):
            best = found
    return best


def _spread(gang: Gang, capacity: Capacity, classes: Sequence[NodeClass]) -> tuple[PlacedBundle, ...] | None:
    """One bundle to each node, the fullest that fits first; again from the start when none is left unused."""
    gpus = gang.bundle.gpu_units // GPU_UNIT
    most = max((len(each.whole) - 1 for each in classes), default=0)
    nodes: list[tuple[Node, int]] = []
    for free in range(gpus, most + 1):
        for node in _bucket(free, capacity, classes, set(), len(capacity)):
            fits = capacity.copies_on(node, gang.bundle)
            if fits:
                nodes.append((node, fits))
            if len(nodes) == gang.count:
                break
        if len(nodes) == gang.count:
            break
    if gang.strategy is Strategy.STRICT_SPREAD and len(nodes) < gang.count:
        return None
    counts = [0] * len(nodes)
    left, again = gang.count, True
    while left and again:
        again = False
        for index, (_, fits) in enumerate(nodes):
            if left and counts[index] < fits:
                counts[index] += 1
                left -= 1
                again = True
    if left:
        return None
    chosen: list[PlacedBundle] = []
    for (node, _), count in zip(nodes, counts, strict=True):
        chosen += _bundles(gang.bundle, node, count)
    return tuple(chosen)


def _place_shares(
    gang: Gang, capacity: Capacity, classes: Sequence[NodeClass]
) -> tuple[PlacedBundle, ...] | None:
    """Shares of a device: the fullest device that holds one, a fresh device of the fullest node last.

    A gang of shares is refused by `rm.spec`; if one comes from elsewhere its bundles go one by one.
    """
    chosen: list[PlacedBundle] = []
    mark = capacity.mark()
    try:
        for _ in range(gang.count):
            used = {each.node_id for each in chosen}
            node = _fullest_device(gang, capacity, classes, used)
            if node is None:
                return None
            (bundle,) = _bundles(gang.bundle, node, 1)
            capacity.take(gang.bundle, [bundle])
            chosen.append(bundle)
    finally:
        capacity.rollback(mark)
    return tuple(chosen)


def _fullest_device(
    gang: Gang, capacity: Capacity, classes: Sequence[NodeClass], used: set[str]
) -> Node | None:
    bundle, strategy = gang.bundle, gang.strategy
    parts = sorted({part for each in classes for part in each.partial if part >= bundle.gpu_units})
    most = max((len(each.whole) - 1 for each in classes), default=0)
    candidates: Iterator[Node]
    found: Node | None = None
    for candidates in (
        *(_numbered(each.partial.get(part, ()), capacity) for part in parts for each in classes),
        *(_bucket(free, capacity, classes, set()) for free in range(1, most + 1)),
    ):
        for node in candidates:
            if not capacity.copies_on(node, bundle):
                continue
            if strategy is Strategy.STRICT_PACK and used and node.id not in used:
                continue
            if node.id in used and strategy is Strategy.STRICT_SPREAD:
                continue
            if node.id in used and strategy is Strategy.SPREAD:
                found = found or node
                continue
            return node
    return found


def _bundles(bundle: Bundle, node: Node, count: int) -> list[PlacedBundle]:
    """`count` bundles on the node's free devices."""
    devices: Devices = usable(node)
    chosen = []
    for _ in range(count):
        slots, devices = devices.take(bundle.gpu_units)
        chosen.append(PlacedBundle(node.id, slots))
    return chosen


def _bucket(
    free: int,
    capacity: Capacity,
    classes: Sequence[NodeClass],
    used: set[str],
    most: int = LOOKS_PER_BUCKET,
) -> Iterator[Node]:
    """Nodes with exactly `free` whole devices, those of `used` left out. Last come those that could go away instead."""
    last: list[tuple[list[int], int]] = []
    for group in classes:
        if free < len(group.whole) and (numbers := group.whole[free]):
            staying = group.staying(free)
            if staying < len(numbers):
                last.append((numbers, staying))
            yield from _unused(capacity, numbers, range(staying), used, most)
    for numbers, first in last:
        yield from _unused(capacity, numbers, range(first, len(numbers)), used, most)


def _unused(
    capacity: Capacity, numbers: Sequence[int], indices: range, used: set[str], most: int
) -> Iterator[Node]:
    looks = 0
    for index in indices:
        node = capacity.node_numbered(numbers[index])
        if node.id not in used:
            yield node
            looks += 1
            if looks >= most:
                return


def _numbered(numbers: Iterable[int], capacity: Capacity) -> Iterator[Node]:
    return (capacity.node_numbered(number) for number in numbers)


def empty_node(node_id: str, shape: NodeShape) -> Node:
    """A node of this shape with nothing on it, for trials. Its id serves as its name."""
    return Node(
        node_id,
        node_id,
        shape.gpu_slots,
        Devices.whole(shape.gpu_slots),
        shape.cpu_milli,
        shape.cpu_milli,
        shape.memory_bytes,
        shape.memory_bytes,
        shape.labels,
    )
