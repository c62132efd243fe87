"""What became of each job in a replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rm.sim.cluster import SimCluster
from rm.sim.trace import TraceJob


class Run(NamedTuple):
    """One stretch with GPUs: from admission to eviction or to the end. Virtual seconds, like `submit_s`."""

    start_s: float
    end_s: float
    gpus: float


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """A job that has ended, and the runs that it had, at least one, in time.

    `lost_gpu_s`: GPU-seconds of its runs that were no progress: restarts, and work done again.
    """

    job: TraceJob
    runs: tuple[Run, ...]
    lost_gpu_s: float = 0.0

    @property
    def first_start_s(self) -> float:
        return self.runs[0].start_s

    @property
    def end_s(self) -> float:
        return self.runs[-1].end_s

    @property
    def preemptions(self) -> int:
        return len(self.runs) - 1

    @property
    def held_s(self) -> float:
        """Seconds with GPUs."""
        return sum(run.end_s - run.start_s for run in self.runs)

    @property
    def jct_s(self) -> float:
        """Job completion time: from its submission to its end."""
        return self.end_s - self.job.submit_s

    @property
    def queue_s(self) -> float:
        """Queueing delay: seconds without GPUs between submission and end, the waits after evictions included.

        For a job that is never evicted this is its completion time minus its duration.
        """
        return self.jct_s - self.held_s


class Sample(NamedTuple):
    """The cluster from `at_s` until the next sample: GPUs held and there, jobs that wait, GPUs held per queue."""

    at_s: float
    busy_gpus: float
    total_gpus: float
    waiting: int
    busy_by_queue: dict[str, float]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a policy made of a trace. `outcomes`: one per job of the trace, in any order.

    `timeline`: None lets it be made of the runs, at the cluster's fixed size; a policy that changes the size of
    the cluster gives its own. `node_hours`: bought beyond the fixed cluster.
    """

    policy: str
    cluster: SimCluster
    outcomes: Sequence[JobOutcome]
    timeline: Sequence[Sample] | None = None
    node_hours: float = 0.0
