"""The allocator's one clock: wall time that can't be stepped.

Its times are seconds since the epoch, so they mean the same to people and after a restart. It reads the wall once, at
its start, and goes on with the monotonic clock. Where the wall shows something else later, it follows by running a
little faster or slower. So a step of the wall (by NTP, by `date -s`, of a virtual machine that was suspended) moves
no deadline at once, and a duration between two of its times is wrong by SLEW at most.

It never goes backwards: not while it runs, and not over a restart, because it does not begin before the newest time
that the ledger has (`Ledger.newest`). A process that Ray starts in place of one that crashed goes on with the clock of
that one (`Anchor`): otherwise a crash after a step would be the jump.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("rm.clock")

SLEW = 0.01
"""How much faster or slower than the monotonic clock it runs at most. Small, because time limits are measured by it."""
STEP_S = 2.0
"""A jump of the wall from one look to the next that is worth a warning. NTP corrects less than that without a step."""
LONGEST_LOOK_S = 10.0
"""What a pause between two looks counts at most for the slewing: a long one must not end in a step of our own."""


MOVED_S = 0.5
"""How far the clock moves against the monotonic one before that is written down."""


class Anchor:
    """A file that says by how much the clock is ahead of the monotonic one, for the next process of the same `life`."""

    def __init__(self, path: Path, life: str) -> None:
        self._path = path
        self._life = life

    def read(self) -> float | None:
        """Seconds; None where this life has written nothing."""
        try:
            said = json.loads(self._path.read_text())
            ahead_s = float(said["ahead_s"])
            return ahead_s if said["life"] == self._life and math.isfinite(ahead_s) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, ahead_s: float) -> None:
        # On a full disk the clock goes on; a process that follows then begins with the wall.
        with contextlib.suppress(OSError):
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps({"life": self._life, "ahead_s": ahead_s}))
            new.replace(self._path)


def boot_id() -> str:
    """Names the run of this machine's kernel, and with it what its monotonic clock counts from."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Clock:
    """Call it for the time. Not before `newest`. For one thread: all who use it are in the allocator's event loop."""

    def __init__(
        self,
        newest: float = 0.0,
        anchor: Anchor | None = None,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._looked = self._began = monotonic()
        self._anchor = anchor
        shown = wall()
        ahead = anchor.read() if anchor is not None else None
        self._start = max(shown if ahead is None else self._began + ahead, newest)
        # Kept apart from the start: near 1e9 a float is too coarse for what one look adds.
        self._slewed = 0.0
        self._last = self._start
        self._wall_ahead = shown - self._start
        """How far the wall is from the unslewed clock. Constant while nobody sets the wall."""
        self._write()
        if abs(self._wall_ahead) > STEP_S:
            log.warning(
                "the system's clock is %+.1f s from %s: the allocator's clock goes on from there, at most %g %% faster "
                "or slower until the two agree",
                self._wall_ahead,
                "the newest time in the ledger"
                if self._start == newest
                else "that of the allocator before it crashed",
                100 * SLEW,
            )

    def __call__(self) -> float:
        """Seconds since the epoch, never less than the last time."""
        looked = self._monotonic()
        unslewed = self._start + (looked - self._began)
        ahead = self._wall() - unslewed
        step_s = ahead - self._wall_ahead
        if abs(step_s) > STEP_S:
            log.warning(
                "the system's clock was stepped by %+.1f s: the allocator's clock does not jump, it runs at most %g %% "
                "faster or slower until the two agree",
                step_s,
                100 * SLEW,
            )
        self._wall_ahead = ahead
        most_s = SLEW * min(max(0.0, looked - self._looked), LONGEST_LOOK_S)
        self._looked = looked
        self._slewed += max(-most_s, min(most_s, ahead - self._slewed))
        if abs(self._slewed - self._written) > MOVED_S:
            self._write()
        self._last = max(self._last, unslewed + self._slewed)
        return self._last

    def _write(self) -> None:
        self._written = self._slewed
        if self._anchor is not None:
            self._anchor.write(self._start - self._began + self._slewed)
