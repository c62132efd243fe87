"""Amounts of GPU, CPU and memory, and what one node's devices can still give.

GPU amounts are integers in ten-thousandths of a device (`GPU_UNIT`), Ray's own resolution, so that sums are
exact. A request below one device takes part of a single device: two halves on two devices are not a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

GPU_UNIT = 10_000
"""One whole GPU."""


def gpu_units(gpus: float) -> int:
    """`gpus` (a count, possibly fractional) in integer units. Rounds to Ray's resolution of 0.0001."""
    return round(gpus * GPU_UNIT)


def gpu_count(units: int) -> float:
    """The inverse of `gpu_units`, an int where it is whole so that it prints as people write it."""
    whole, part = divmod(units, GPU_UNIT)
    return whole if part == 0 else units / GPU_UNIT


def gpus_in_words(units: int, kind: str = "") -> str:
    """ "1 GPU", "0.5 GPUs", "8 A100 GPUs"."""
    return f"{gpu_count(units):g} {kind}{' ' if kind else ''}GPU{'' if units == GPU_UNIT else 's'}"


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one bundle of a gang holds on one node.

    `gpu_units` is a multiple of GPU_UNIT, or less than one. `cpu_milli` and `memory_bytes` may be 0.
    """

    gpu_units: int
    cpu_milli: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Amount:
    """So much of one node: GPUs, CPUs and memory together, so that no rule can forget one of them.

    A difference may be negative in some part. False where there is nothing of anything.
    """

    gpu_units: int = 0
    cpu_milli: int = 0
    memory_bytes: int = 0

    @classmethod
    def of(cls, bundle: Bundle, count: int = 1) -> Amount:
        """What `count` such bundles take."""
        return cls(bundle.gpu_units * count, bundle.cpu_milli * count, bundle.memory_bytes * count)

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.gpu_units + other.gpu_units,
            self.cpu_milli + other.cpu_milli,
            self.memory_bytes + other.memory_bytes,
        )

    def __sub__(self, other: Amount) -> Amount:
        return Amount(
            self.gpu_units - other.gpu_units,
            self.cpu_milli - other.cpu_milli,
            self.memory_bytes - other.memory_bytes,
        )

    def __neg__(self) -> Amount:
        return NOTHING - self

    def __bool__(self) -> bool:
        return bool(self.gpu_units or self.cpu_milli or self.memory_bytes)

    def holds(self, bundle: Bundle) -> bool:
        """Whether the bundle fits, as far as amounts tell. What it does not ask for may be short."""
        return (
            self.gpu_units >= bundle.gpu_units
            and (self.cpu_milli >= bundle.cpu_milli or not bundle.cpu_milli)
            and (self.memory_bytes >= bundle.memory_bytes or not bundle.memory_bytes)
        )

    def at_most(self, other: Amount) -> Amount:
        """Of each the smaller."""
        return Amount(
            min(self.gpu_units, other.gpu_units),
            min(self.cpu_milli, other.cpu_milli),
            min(self.memory_bytes, other.memory_bytes),
        )

    def beyond(self, other: Amount) -> Amount:
        """What is missing where there is only `other`: never negative."""
        return Amount(
            max(0, self.gpu_units - other.gpu_units),
            max(0, self.cpu_milli - other.cpu_milli),
            max(0, self.memory_bytes - other.memory_bytes),
        )


NOTHING = Amount()


@dataclass(frozen=True, slots=True)
class Devices:
    """The free units of each GPU of one node, by slot.

    A slot stands for a device whose identity only Ray knows. Ray gives a fractional request the fullest device
    that still holds it; `take` does the same, so that the multiset of free shares stays equal to Ray's.
    """

    free: tuple[int, ...]

    @classmethod
    def whole(cls, count: int) -> Devices:
        return cls((GPU_UNIT,) * count)

    @classmethod
    def none(cls, count: int) -> Devices:
        return cls((0,) * count)

    @property
    def total_free(self) -> int:
        return sum(self.free)

    def fits(self, units: int) -> bool:
        if units >= GPU_UNIT:
            return self.free.count(GPU_UNIT) * GPU_UNIT >= units
        return any(free >= units for free in self.free)

    def copies(self, units: int) -> int:
        """How many requests of `units` fit at once."""
        if units >= GPU_UNIT:
            return self.free.count(GPU_UNIT) * GPU_UNIT // units
        return sum(free // units for free in self.free)

    def take(self, units: int) -> tuple[tuple[int, ...], Devices]:
        """The slots that `units` take, and what is left. Raises ValueError where they don't fit."""
        if not self.fits(units):
            raise ValueError(f"{units} units do not fit in {self.free}")
        if units >= GPU_UNIT:
            slots = tuple(i for i, free in enumerate(self.free) if free == GPU_UNIT)[: units // GPU_UNIT]
        else:
            slots = (min((i for i, f in enumerate(self.free) if f >= units), key=lambda i: self.free[i]),)
        return slots, self.take_slots(slots, units)

    def take_slots(self, slots: tuple[int, ...], units: int) -> Devices:
        """What is left when these very slots are taken."""
        return self._changed(slots, units, -1)

    def give(self, slots: tuple[int, ...], units: int) -> Devices:
        """The inverse of `take`."""
        return self._changed(slots, units, +1)

    def _changed(self, slots: tuple[int, ...], units: int, sign: int) -> Devices:
        per_slot = min(GPU_UNIT, units)
        changed = list(self.free)
        for slot in slots:
            changed[slot] += sign * per_slot
            assert 0 <= changed[slot] <= GPU_UNIT, "a device was given or taken twice"
        return Devices(tuple(changed))

    def without_foreign(self, units: int) -> Devices:
        """What is left when somebody else holds `units`, on devices that we can't know.

        Whole devices first, the remainder from the freest one: the pessimistic reading, so that we never plan a
        whole GPU that a stranger shares.
        """
        return Devices(_without(self.free, units))


@lru_cache(maxsize=65_536)
def _without(free: tuple[int, ...], units: int) -> tuple[int, ...]:
    """Asked for the same few patterns again and again in a cycle."""
    changed = list(free)
    for slot in sorted(range(len(changed)), key=changed.__getitem__, reverse=True):
        if units <= 0:
            break
        taken = min(units, changed[slot])
        changed[slot] -= taken
        units -= taken
    return tuple(changed)
