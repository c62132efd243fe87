"""Who has used how much: an owner's GPUs, averaged over time so that old use fades.

usage ← (1 − A)·usage + A·current with A = 1 − 0.5^(Δt / half-life): the exact solution for a holding that is
constant over Δt, so it does not matter how often it is looked at (Kueue's admission fair sharing samples it).
What an owner holds now counts as if it had been held for SOON_S longer, so that a burst of one owner cannot get
ahead of the decay: with each admission the owner's own next job steps back.
"""

from __future__ import annotations

from dataclasses import dataclass

SOON_S = 300.0


@dataclass(slots=True)
class Usage:
    """One owner's average in GPU units at time `at`, and what the owner holds since."""

    average: float = 0.0
    current: int = 0
    at: float = 0.0

    def settle(self, now: float, half_life_s: float) -> None:
        """Bring the average up to `now`. A clock that went back changes nothing."""
        elapsed_s = now - self.at
        if elapsed_s > 0:
            keep: float = 0.5 ** (elapsed_s / half_life_s)
            self.average = keep * self.average + (1.0 - keep) * self.current
            self.at = now

    def change(self, units: int, now: float, half_life_s: float) -> None:
        """The owner holds `units` more from now on (negative: fewer)."""
        self.settle(now, half_life_s)
        self.current += units

    def standing(self, now: float, half_life_s: float) -> float:
        """What the order compares: lower comes first."""
        elapsed_s = max(0.0, now - self.at)
        keep: float = 0.5 ** ((elapsed_s + SOON_S) / half_life_s)
        return keep * self.average + (1.0 - keep) * self.current


def soon(units: int, half_life_s: float) -> float:
    """What holding `units` for the next SOON_S adds to a standing."""
    keep: float = 0.5 ** (SOON_S / half_life_s)
    return (1.0 - keep) * units
