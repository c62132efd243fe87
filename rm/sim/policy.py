"""The seam between the simulator and what decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rm.sim.cluster import SimCluster
from rm.sim.outcomes import Replay
from rm.sim.trace import TraceJob

Progress = Callable[[int], None]
"""Told how many jobs of the trace have ended so far; called often, so it must be cheap."""


def silent(ended: int) -> None:
    """The progress that nobody looks at."""


class Policy(Protocol):
    """Decides who runs when. `name` is what `--policy` calls it; `summary` is one line for the help."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    def replay(self, jobs: Sequence[TraceJob], cluster: SimCluster, progress: Progress = silent) -> Replay:
        """Run `jobs` (sorted by `submit_s`) on `cluster` until the last one has ended.

        Raises InvalidSpec or Infeasible where a job can never run on it.
        """
        ...
