"""From "num_gpus=12" to a gang: the rules of how a count of GPUs is cut into bundles, and what is refused.

Asked at submission. A request that no mix of this cluster's nodes could ever hold is refused at once, with the
nearest shapes that can be; one that merely has to wait is not refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from rm.core.capacity import matches
from rm.core.model import Gang, NodeShape, Strategy
from rm.core.placement import feasible
from rm.core.resources import GPU_UNIT, Bundle, gpu_count
from rm.errors import Infeasible, InvalidSpec

NEAR = 16
"""How far from the count asked for the nearest ones that work are looked for."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for. Either `gpu_units` in all, or `nodes` × `gpu_units_per_node`.

    CPU and memory are per GPU and scale with the bundle.
    """

    gpu_units: int | None
    nodes: int | None = None
    gpu_units_per_node: int | None = None
    cpu_milli_per_gpu: int = 0
    memory_bytes_per_gpu: int = 0
    strategy: Strategy = Strategy.PACK
    gpu_types: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


def resolve(request: Request, shapes: Sequence[NodeShape]) -> Gang:
    """The gang for `request` on a cluster that has, or can launch, `shapes`.

    Raises InvalidSpec for a count that can't be cut equally and Infeasible for one that could never be held.
    """
    fitting = [shape for shape in shapes if matches(_gang(request, GPU_UNIT, 1), shape.labels)]
    if not fitting:
        raise Infeasible(_nothing_matches(request, shapes), field=_wanted_field(request))
    if request.gpu_units is not None:
        gang = _cut(request, request.gpu_units, fitting)
    else:
        assert request.nodes is not None and request.gpu_units_per_node is not None
        gang = _gang(request, request.gpu_units_per_node, request.nodes)
    if not feasible(gang, fitting):
        raise Infeasible(_too_large(request, gang, fitting), field=_count_field(request))
    return gang


def as_asked(request: Request) -> Gang:
    """The gang where nothing is known of the nodes: a count of GPUs is one bundle until it can be cut (`recut`)."""
    if request.gpu_units is not None:
        return _gang(request, request.gpu_units, 1)
    assert request.nodes is not None and request.gpu_units_per_node is not None
    return _gang(request, request.gpu_units_per_node, request.nodes)


def recut(gang: Gang, shapes: Sequence[NodeShape]) -> Gang:
    """The gang for as many GPUs, now that more is known of the nodes. As it was, where they could never hold it."""
    gpus = gang.gpu_units / GPU_UNIT
    cpu, memory = gang.bundle.cpu_milli * gang.count, gang.bundle.memory_bytes * gang.count
    request = Request(
        gang.gpu_units,
        cpu_milli_per_gpu=round(cpu / gpus),
        memory_bytes_per_gpu=round(memory / gpus),
        strategy=gang.strategy,
        gpu_types=gang.gpu_types,
        labels=gang.labels,
    )
    try:
        return resolve(request, shapes)
    except (Infeasible, InvalidSpec):
        return gang


def _cut(request: Request, units: int, shapes: Sequence[NodeShape]) -> Gang:
    """One bundle if it fits the largest node, else the fewest equal bundles that do."""
    largest = max(shape.gpu_slots for shape in shapes) * GPU_UNIT
    if units <= largest or largest == 0:
        return _gang(request, units, 1)
    gpus = units // GPU_UNIT
    cuts = [count for count in range(2, gpus + 1) if gpus % count == 0]
    for count in cuts:
        gang = _gang(request, units // count, count)
        if feasible(gang, shapes):
            return gang
    total = sum(shape.gpu_slots * shape.most for shape in shapes)
    if gpus > total:
        raise Infeasible(_never_so_many(request, gpus, total), field="num_gpus")
    if gpus % (largest // GPU_UNIT) == 0:
        return _gang(request, largest, units // largest)  # the caller says what is wrong with it
    works = ", ".join(str(count) for count in _near(request, gpus, shapes)) or "none near it"
    raise InvalidSpec(
        f"num_gpus={gpus} can't be cut into equal bundles for nodes of {gpu_count(largest):g} GPUs; "
        f"counts that would work: {works}; or say nodes= and gpus_per_node= yourself",
        field="num_gpus",
    )


def _near(request: Request, gpus: int, shapes: Sequence[NodeShape]) -> list[int]:
    """The counts closest to `gpus` that can be cut and held, three at most, ascending."""
    largest = max(shape.gpu_slots for shape in shapes)
    near = [each for step in range(1, NEAR) for each in (gpus - step, gpus + step) if each > 0]
    fits = (
        wanted
        for wanted in near
        if any(
            wanted % count == 0 and feasible(_gang(request, wanted // count * GPU_UNIT, count), shapes)
            for count in range(-(-wanted // largest), wanted + 1)
        )
    )
    return sorted(islice(fits, 3))


def _gang(request: Request, units: int, count: int) -> Gang:
    gpus = units / GPU_UNIT
    bundle = Bundle(
        units, round(request.cpu_milli_per_gpu * gpus), round(request.memory_bytes_per_gpu * gpus)
    )
    return Gang(bundle, count, request.strategy, request.gpu_types, request.labels)


def _nothing_matches(request: Request, shapes: Sequence[NodeShape]) -> str:
    if request.gpu_types:
        kinds = sorted({s.gpu_type for s in shapes if s.gpu_slots and s.gpu_type})
        have = f"it has {', '.join(kinds)}" if kinds else "its nodes carry no GPU type"
        return f"no node of this cluster has a GPU of type {' or '.join(request.gpu_types)}; {have}"
    if request.labels:
        wanted = ", ".join(f"{key}={value}" for key, value in request.labels)
        return f"no node of this cluster carries the labels {wanted}"
    return "this cluster has no nodes yet; try again when its head has started"


def _too_large(request: Request, gang: Gang, shapes: Sequence[NodeShape]) -> str:
    total = sum(shape.gpu_slots * shape.most for shape in shapes)
    largest = max(shape.gpu_slots for shape in shapes)
    if total == 0:
        return f"{gang} asked for, but this cluster has no GPUs and no node type that has any"
    if gang.gpu_units > total * GPU_UNIT:
        return _never_so_many(request, gpu_count(gang.gpu_units), total)
    if gang.bundle.gpu_units > largest * GPU_UNIT:
        return (
            f"{gpu_count(gang.bundle.gpu_units):g} GPUs on one node asked for, but the largest node"
            f"{_of_type(request)} has {largest}; {_split(gang, largest)}"
        )
    if gang.bundle.cpu_milli or gang.bundle.memory_bytes:
        cpus = max(shape.cpu_milli for shape in shapes) / 1000
        memory_gib = max(shape.memory_bytes for shape in shapes) / 2**30
        return (
            f"{gang} with {gang.bundle.cpu_milli / 1000:g} CPUs and {gang.bundle.memory_bytes / 2**30:.1f} GiB "
            f"per bundle fits on no empty cluster; the largest node has {cpus:g} CPUs and {memory_gib:.1f} GiB: "
            "lower cpus_per_gpu or memory_per_gpu"
        )
    return (
        f"{gang} with strategy {gang.strategy} can't be placed even on an empty cluster of {total} GPUs "
        f"(largest node: {largest}); fewer GPUs per bundle or another strategy would work"
    )


def _never_so_many(request: Request, gpus: float, total: int) -> str:
    return (
        f"{_count_field(request)}: {gpus:g} GPUs asked for, but this cluster can never have more than "
        f"{total}{_of_type(request)}"
    )


def _split(gang: Gang, largest: int) -> str:
    gpus = gang.gpu_units // GPU_UNIT
    for per_node in range(largest, 0, -1):
        if gpus % per_node == 0:
            return f"nodes={gpus // per_node}, gpus_per_node={per_node} would work if there is room for it"
    return f"at most gpus_per_node={largest}"


def _of_type(request: Request) -> str:
    return f" of type {' or '.join(request.gpu_types)}" if request.gpu_types else ""


def _wanted_field(request: Request) -> str:
    return "gpu_type" if request.gpu_types else "labels"


def _count_field(request: Request) -> str:
    return "num_gpus" if request.gpu_units is not None else "gpus_per_node"
