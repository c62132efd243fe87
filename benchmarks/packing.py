"""Packing shares and whole GPUs: our best fit beside fragmentation gradient descent, on a generated mix.

    python benchmarks/packing.py [--nodes 50] [--seeds 5]

Best fit is the product's own (`rm.core.placement`). The other follows Weng et al., "Beware of Fragmentation" (USENIX
ATC '23): a node's fragmentation is the free GPU share that a job drawn from the mix could not use there, and a job
goes where it adds least to it. Two experiments, medians over seeds:

fill    jobs are placed until what was asked for is 130 % of the cluster: how much of it is allocated at the end, and
        at which demand the first job was refused.
churn   jobs come and go at a demand of 98 % for as long as 20 fills: the share of jobs refused on arrival.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from rm.core.capacity import Capacity
from rm.core.model import Gang, Node, PlacedBundle
from rm.core.placement import place
from rm.core.resources import GPU_UNIT, Bundle, Devices

MIXES = {
    "shares": ((0.1, 0.15), (0.25, 0.25), (0.5, 0.25), (1, 0.25), (2, 0.05), (4, 0.03), (8, 0.02)),
    "whole": ((0.5, 0.05), (1, 0.45), (2, 0.2), (4, 0.15), (8, 0.15)),
}
"""GPUs of a job, and how many of all jobs ask for that."""
SLOTS = 8
Placer = Callable[[Gang, Capacity], tuple[PlacedBundle, ...] | None]


def cluster(nodes: int) -> Capacity:
    capacity = Capacity()
    for number in range(nodes):
        name = f"n{number:03}"
        capacity.join(Node(name, name, SLOTS, Devices.whole(SLOTS), 10**6, 10**6, 2**40, 2**40))
    return capacity


class Gradient:
    """Least added fragmentation. Fragmentation of a set of devices is remembered: there are few kinds."""

    def __init__(self, mix: tuple[tuple[float, float], ...]) -> None:
        self._mix = [(round(gpus * GPU_UNIT), share) for gpus, share in mix]
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, gang: Gang, capacity: Capacity) -> tuple[PlacedBundle, ...] | None:
        units = gang.bundle.gpu_units
        best: tuple[float, int, str, tuple[int, ...]] | None = None
        tried: set[tuple[int, ...]] = set()
        for node in capacity.nodes.values():
            kind = tuple(sorted(node.devices.free))
            if kind in tried or not node.devices.fits(units):
                continue
            tried.add(kind)
            before = self._fragmentation(kind)
            for slots in self._ways(node.devices, units):
                after = self._fragmentation(tuple(sorted(node.devices.take_slots(slots, units).free)))
                found = (after - before, sum(kind), node.id, slots)
                if best is None or found < best:
                    best = found
        return None if best is None else (PlacedBundle(best[2], best[3]),)

    @staticmethod
    def _ways(devices: Devices, units: int) -> list[tuple[int, ...]]:
        if units >= GPU_UNIT:
            return [devices.take(units)[0]]
        ways: dict[int, tuple[int, ...]] = {}
        for slot, free in enumerate(devices.free):
            if free >= units:
                ways.setdefault(free, (slot,))
        return list(ways.values())

    def _fragmentation(self, free: tuple[int, ...]) -> float:
        if free not in self._known:
            devices, lost = Devices(free), 0.0
            for units, share in self._mix:
                if not devices.fits(units):
                    lost += share * sum(free)
                else:
                    lost += share * sum(each for each in free if each < min(units, GPU_UNIT))
            self._known[free] = lost
        return self._known[free]


def jobs(mix: tuple[tuple[float, float], ...], random_: random.Random) -> Callable[[], Gang]:
    sizes, weights = zip(*mix, strict=True)
    gangs = {size: Gang(Bundle(round(size * GPU_UNIT))) for size in sizes}
    return lambda: gangs[random_.choices(sizes, weights)[0]]


def fill(placer: Placer, draw: Callable[[], Gang], nodes: int) -> tuple[float, float]:
    """(allocated share at a demand of 130 %, demand at the first refusal)."""
    capacity, asked, refused_at = cluster(nodes), 0, 0.0
    total = nodes * SLOTS * GPU_UNIT
    while asked < 1.3 * total:
        gang = draw()
        asked += gang.gpu_units
        places = placer(gang, capacity)
        if places is not None:
            capacity.take(gang.bundle, places)
        elif not refused_at:
            refused_at = asked / total
    return capacity.totals().charged / total, refused_at


def churn(placer: Placer, draw: Callable[[], Gang], nodes: int, random_: random.Random) -> float:
    """Share of jobs that found no place, at a demand that just fits."""
    capacity, total = cluster(nodes), nodes * SLOTS * GPU_UNIT
    running: list[tuple[Gang, tuple[PlacedBundle, ...]]] = []
    arrived = refused = passed = 0
    while passed < 20 * total:
        gang = draw()
        while running and capacity.totals().charged + gang.gpu_units > 0.98 * total:
            index = random_.randrange(len(running))
            running[index], running[-1] = running[-1], running[index]
            ended, places = running.pop()
            capacity.give(ended.bundle, places)
        found = placer(gang, capacity)
        arrived += 1
        passed += gang.gpu_units
        if found is None:
            refused += 1
        else:
            capacity.take(gang.bundle, found)
            running.append((gang, found))
    return refused / arrived


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    table = Table(title=f"{args.nodes} nodes × {SLOTS} GPUs, medians of {args.seeds} seeds")
    for column in (
        "mix",
        "placement",
        "allocated at 130 %",
        "first refusal at",
        "refused in churn",
        "µs per job",
    ):
        table.add_column(column, justify="left" if column in ("mix", "placement") else "right")
    for name, mix in MIXES.items():
        for label, make in (("best fit (rm)", lambda _: place), ("gradient descent", Gradient)):
            rows, began, count = [], time.perf_counter(), 0
            for seed in range(args.seeds):
                random_ = random.Random(seed)
                inner = jobs(mix, random_)

                def draw(inner: Callable[[], Gang] = inner) -> Gang:
                    nonlocal count
                    count += 1
                    return inner()

                placer = make(mix)
                rows.append((*fill(placer, draw, args.nodes), churn(placer, draw, args.nodes, random_)))
            spent = (time.perf_counter() - began) / count * 1e6
            allocated, first, refused = (statistics.median(column) for column in zip(*rows, strict=True))
            table.add_row(name, label, f"{allocated:.1%}", f"{first:.1%}", f"{refused:.2%}", f"{spent:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
