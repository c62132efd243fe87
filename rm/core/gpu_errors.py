"""What NVIDIA's driver reports as errors of a GPU, and who has to answer for it: the program, or the node. Pure.

Source: the catalog of Xid events, https://docs.nvidia.com/deploy/xid-errors/ (what to do at once, by number), and
NVML's recovery action, with which newer drivers say themselves what a GPU needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PROGRAM: Mapping[int, str] = {
    11: "a corrupted command stream",
    13: "an exception in a kernel",
    31: "a memory page fault",
    32: "a corrupted command stream",
    43: "the channel was reset",
    45: "the channel was torn down",
    68: "an exception in the video decoder",
    69: "an exception in a kernel",
    109: "a context switch that timed out",
}
"""Mostly the program's own doing: told in its message, and counted against nobody."""
CONTAINED: Mapping[int, str] = {
    63: "a row of memory is to be remapped",
    94: "an uncorrectable memory error, contained",
}
"""The program had no part in it, and the GPU can go on: the attempt is lost to the infrastructure."""
BROKEN: Mapping[int, str] = {
    46: "the GPU stopped processing",
    48: "an uncorrectable memory error",
    62: "its microcontroller halted",
    64: "a row of memory could not be remapped",
    74: "an NVLink error",
    79: "it has fallen off the bus",
    95: "an uncontained memory error",
    110: "a security fault",
    119: "its firmware does not answer",
    120: "an error in its firmware",
    136: "a failed NVLink training",
    140: "an unrecovered memory error",
    143: "it could not be initialised",
    155: "an NVLink that was set down",
    156: "a resource was retired",
    158: "a fatal timeout",
}
"""The GPU needs a reset, or more: nothing new should start on its node."""


@dataclass(frozen=True, slots=True)
class Xid:
    """One error event. `gpu`: the device as CUDA_VISIBLE_DEVICES names it, `number`: NVIDIA's."""

    gpu: str
    number: int

    @property
    def infra(self) -> bool:
        """Whether the program had no part in it."""
        return self.number in CONTAINED or self.broken

    @property
    def broken(self) -> bool:
        """Whether the GPU can't go on."""
        return self.number in BROKEN

    def __str__(self) -> str:
        """ "GPU 0 reported Xid 79 (it has fallen off the bus)"."""
        known = (PROGRAM.get(self.number), CONTAINED.get(self.number), BROKEN.get(self.number))
        words = next((each for each in known if each), "")
        return f"GPU {self.gpu} reported Xid {self.number}" + (f" ({words})" if words else "")


@dataclass(frozen=True, slots=True)
class GpuCondition:
    """What the driver says of one GPU now. `uncorrected`: memory errors since the driver was loaded.

    `action`: what the driver wants done, "" for nothing, None where it can't say so.
    """

    gpu: int
    lost: bool = False
    uncorrected: int = 0
    remap_pending: bool = False
    remap_failed: bool = False
    action: str | None = None

    def trouble(self) -> str:
        """Why nothing new should start beside it, in words; "" where all is well.

        A memory error that was contained leaves the GPU usable; whether it was, a driver that knows an action knows.
        """
        if self.lost:
            return f"GPU {self.gpu} does not answer the driver: the node needs a restart"
        if self.remap_failed:
            return f"GPU {self.gpu} has memory that could not be remapped: it needs to be replaced"
        errors = f"{self.uncorrected} uncorrectable memory errors since the driver was loaded"
        if self.action:
            return f"GPU {self.gpu} needs {self.action}" + (f" ({errors})" if self.uncorrected else "")
        if self.action is None and (self.uncorrected or self.remap_pending):
            why = errors if self.uncorrected else "memory that is to be remapped"
            return f"GPU {self.gpu} has {why}: it needs a reset"
        return ""
