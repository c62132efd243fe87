"""What if these GPUs came back: would the gang fit then, and where?

Backfill asks it of running jobs in the order of their ends, preemption of victims in the order of their loss. The
question is put thousands of times, so a cheap bound is kept up to date with every change and only when that is
met is the real placement tried. For a gang of whole devices that may be cut anywhere the bound says it all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from rm.core.capacity import Capacity, NodeClass, copies_in, foreign
from rm.core.model import Attempt, Gang, PlacedBundle, Strategy
from rm.core.placement import place
from rm.core.records import replace
from rm.core.resources import GPU_UNIT, NOTHING, Amount, Bundle, Devices


class _Site:
    """One node with what came back there so far. `others`: what of it is not for us: held, kept, or waited for."""

    __slots__ = ("copies", "cpu_milli", "devices", "memory_bytes", "others")

    def __init__(self, devices: Devices, cpu_milli: int, memory_bytes: int, others: Amount) -> None:
        self.devices = devices
        self.cpu_milli = cpu_milli
        self.memory_bytes = memory_bytes
        self.others = others
        self.copies = 0

    def count(self, bundle: Bundle) -> int:
        others = self.others
        free = self.devices.without_foreign(others.gpu_units) if others.gpu_units else self.devices
        return copies_in(
            bundle, free, self.cpu_milli - others.cpu_milli, self.memory_bytes - others.memory_bytes
        )


class Relief:
    """The gang's prospects on `classes` while GPUs come back one attempt at a time.

    As a context it keeps what it has tried on the index from one question to the next, and takes it back at the end;
    nobody else may look at the index meanwhile.
    """

    def __init__(
        self, gang: Gang, capacity: Capacity, classes: Sequence[NodeClass], owed: Mapping[str, Amount]
    ) -> None:
        self._gang = gang.sized(gang.minimum)
        self._capacity = capacity
        self._classes = classes
        self._keys = {id(each) for each in classes}
        self._owed = owed
        self._sites: dict[str, _Site] = {}
        self._untried: set[str] = set()
        """Sites that have changed since they were put on the index."""
        self._mark: int | None = None
        bundle = self._gang.bundle
        plain = not bundle.cpu_milli and not bundle.memory_bytes
        self._exact = plain and bundle.gpu_units >= GPU_UNIT and gang.strategy is Strategy.PACK
        self._in_vain = False
        """Whether the gang was placed in vain, and no more of its bundles fit anywhere since."""
        gpus = max(1, gang.bundle.gpu_units // GPU_UNIT)
        self._total = sum(each.copies(gpus) for each in classes)
        self._nodes = sum(len(nodes) for each in classes for nodes in each.whole[gpus:])
        self._best = max((f // gpus for c in classes for f, nodes in enumerate(c.whole) if nodes), default=0)

    def __enter__(self) -> Self:
        self._mark = self._capacity.mark()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._mark is not None
        self._capacity.rollback(self._mark)
        self._mark = None

    def give(self, bundle: Bundle, attempt: Attempt) -> bool:
        """The attempt's bundles come back. True where any of it is on nodes that count here."""
        return self._move(bundle, attempt.placed, +1)

    @property
    def node_ids(self) -> frozenset[str]:
        """The nodes that count here and on which anything came back."""
        return frozenset(self._sites)

    def take(self, bundle: Bundle, attempt: Attempt) -> None:
        """The inverse of `give`."""
        self._move(bundle, attempt.placed, -1)

    def fits(self) -> bool:
        """Whether the gang's minimum fits now."""
        return self._may_fit() if self._exact else self.places() is not None

    def places(self) -> tuple[PlacedBundle, ...] | None:
        """Where the gang's minimum fits now, or None."""
        if self._in_vain or not self._may_fit():
            return None
        found = self._real()
        self._in_vain = found is None
        return found

    def _move(self, bundle: Bundle, placed: Sequence[PlacedBundle], sign: int) -> bool:
        met = False
        for each in placed:
            site = self._site(each.node_id)
            if site is None:
                continue
            met = True
            self._untried.add(each.node_id)
            before = site.copies
            site.devices = (site.devices.give if sign > 0 else site.devices.take_slots)(
                each.slots, bundle.gpu_units
            )
            site.cpu_milli += sign * bundle.cpu_milli
            site.memory_bytes += sign * bundle.memory_bytes
            site.copies = site.count(self._gang.bundle)
            if site.copies > before:
                self._in_vain = False
            self._total += site.copies - before
            self._nodes += bool(site.copies) - bool(before)
            self._best = max(self._best, site.copies)
        return met

    def _site(self, node_id: str) -> _Site | None:
        site = self._sites.get(node_id)
        if site is None:
            if node_id not in self._capacity or id(self._capacity.class_of(node_id)) not in self._keys:
                return None
            node = self._capacity[node_id]
            if node.cordoned:
                return None
            site = _Site(
                node.devices,
                node.cpu_free_milli,
                node.memory_free_bytes,
                foreign(node) + self._owed.get(node_id, NOTHING),
            )
            site.copies = site.count(self._gang.bundle)
            indexed = self._capacity.copies_on(node, self._gang.bundle)
            self._total += site.copies - indexed
            self._nodes += bool(site.copies) - bool(indexed)
            self._sites[node_id] = site
            self._untried.add(node_id)
        return site

    def _may_fit(self) -> bool:
        """A bound: never says no where the gang fits."""
        count = self._gang.count
        if self._gang.bundle.gpu_units < GPU_UNIT:
            return True
        if self._gang.strategy is Strategy.STRICT_PACK:
            return self._best >= count
        if self._gang.strategy is Strategy.STRICT_SPREAD:
            return self._nodes >= count
        return self._total >= count

    def _real(self) -> tuple[PlacedBundle, ...] | None:
        if self._mark is not None:
            return self._placed(self._untried)
        mark = self._capacity.mark()
        try:
            return self._placed(set(self._sites))
        finally:
            self._capacity.rollback(mark)

    def _placed(self, node_ids: set[str]) -> tuple[PlacedBundle, ...] | None:
        """Put these sites on the index and ask it."""
        for node_id in node_ids:
            node, site = self._capacity[node_id], self._sites[node_id]
            self._capacity.replace(
                replace(
                    node,
                    devices=site.devices,
                    cpu_free_milli=site.cpu_milli,
                    memory_free_bytes=site.memory_bytes,
                    foreign_units=site.others.gpu_units,
                    foreign_cpu_milli=site.others.cpu_milli,
                    foreign_memory_bytes=site.others.memory_bytes,
                )
            )
        self._untried = set()
        return place(self._gang, self._capacity, self._classes)
