"""Policies under the rules of the published simulators of Helios (Hu et al., SC '21) and Lucid (Hu et al., ASPLOS '23).

They are what our own scheduler is compared with, and what this simulator is checked against: it must give the
mean completion times that those simulators give. The published ones look at the whole cluster once a virtual
second. Here time jumps from event to event, which gives the same ends, job for job (`tests/sim` compares both):

- Times are whole seconds: a fraction is rounded up, and a job runs for at least one.
- Within a second: jobs that have ended free their GPUs, new ones join the queue, then the policy decides.
- What ends or arrives in the same second is decided on together, in the order of the trace.
- Under a preemptive policy a job's GPUs are free one second after its work is done.

Only whole GPUs exist under these rules: a share of a device takes the whole one. GPU types are not looked at.
The preemptive policies are in `published_preemptive`.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rm.sim.cluster import Pool, SimCluster, whole_gpus
from rm.sim.consolidation import ConsolidatedNodes, Share
from rm.sim.outcomes import JobOutcome, Replay, Run
from rm.sim.policy import Progress, silent
from rm.sim.trace import TraceJob


def submit_tick(job: TraceJob) -> int:
    """The whole second at which the job is seen first."""
    return math.ceil(job.submit_s)


def work_ticks(job: TraceJob) -> int:
    """Whole seconds of work, at least one."""
    return max(1, math.ceil(job.duration_s))


class Counted:
    """Adds up the ended jobs of all pools for one progress callback."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._ended = 0

    def one_more(self) -> None:
        self._ended += 1
        self._progress(self._ended)


def by_submission(job: TraceJob) -> float:
    return submit_tick(job)


def by_duration(job: TraceJob) -> float:
    return work_ticks(job)


@dataclass(frozen=True, slots=True)
class RunToCompletion:
    """One order, no preemption: a job that has started keeps its GPUs until its end.

    `key`: smaller is earlier, ties in the order of the trace. `skip`: whether a job that doesn't fit lets those
    behind it try (without any reservation, so a large gang can starve), or blocks them all.
    """

    name: str
    summary: str
    key: Callable[[TraceJob], float]
    skip: bool = False

    def replay(self, jobs: Sequence[TraceJob], cluster: SimCluster, progress: Progress = silent) -> Replay:
        counted = Counted(progress)
        outcomes: list[JobOutcome] = []
        for pool, own in cluster.split(jobs):
            keys = [self.key(job) for job in own]
            outcomes += _run_to_completion(pool, own, keys, skip=self.skip, counted=counted)
        return Replay(self.name, cluster, outcomes)


@dataclass(slots=True)
class _Waiting:
    """Waiting jobs as (key, number in the trace), one sorted list for each count of GPUs."""

    by_gpus: dict[int, list[tuple[float, int]]] = field(default_factory=dict)

    def add(self, key: float, number: int, gpus: int) -> None:
        insort(self.by_gpus.setdefault(gpus, []), (key, number))

    def first(self, below: float) -> tuple[int, int] | None:
        """The first in order among those that want fewer than `below` GPUs: its number and its GPUs."""
        heads = [(jobs[0], gpus) for gpus, jobs in self.by_gpus.items() if jobs and gpus < below]
        if not heads:
            return None
        (_, number), gpus = min(heads)
        return number, gpus

    def pop_first(self, gpus: int) -> None:
        del self.by_gpus[gpus][0]


def _run_to_completion(
    pool: Pool, jobs: list[TraceJob], keys: list[float], *, skip: bool, counted: Counted
) -> list[JobOutcome]:
    nodes = ConsolidatedNodes(pool)
    waiting = _Waiting()
    running: list[tuple[int, int]] = []
    places: dict[int, tuple[Share, ...]] = {}
    outcomes: list[JobOutcome] = []
    arrived = 0
    while arrived < len(jobs) or running:
        now = min(
            submit_tick(jobs[arrived]) if arrived < len(jobs) else math.inf,
            running[0][0] if running else math.inf,
        )
        while running and running[0][0] == now:
            _, number = heapq.heappop(running)
            nodes.release(places.pop(number))
            counted.one_more()
        while arrived < len(jobs) and submit_tick(jobs[arrived]) == now:
            waiting.add(keys[arrived], arrived, whole_gpus(jobs[arrived]))
            arrived += 1
        # What doesn't fit rules out everything that wants as much or more: placement is monotone in the GPUs.
        below = math.inf
        while (first := waiting.first(below)) is not None:
            number, gpus = first
            placed = nodes.place(gpus)
            if placed is None:
                if not skip:
                    break
                below = gpus
                continue
            waiting.pop_first(gpus)
            places[number] = placed
            job = jobs[number]
            end = int(now) + work_ticks(job)
            heapq.heappush(running, (end, number))
            outcomes.append(JobOutcome(job, (Run(now, end, job.num_gpus),)))
    return outcomes


FIFO = RunToCompletion(
    "fifo", "by submission; the first that doesn't fit blocks all behind it", by_submission
)
SJF = RunToCompletion("sjf", "shortest duration first (oracle), blocking like fifo", by_duration)
FIFO_SKIP = RunToCompletion(
    "fifo+skip", "by submission, past what doesn't fit; nothing is reserved", by_submission, skip=True
)
SJF_SKIP = RunToCompletion(
    "sjf+skip", "shortest duration first (oracle), past what doesn't fit", by_duration, skip=True
)
