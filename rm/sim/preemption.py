"""What preemptive policies under the published rules share: jobs that come and go on one pool, and the choice.

The choice is a walk over all jobs, running and waiting, in the policy's order, with the pool's GPU count as a
quota: a job that fits what is left of it is *chosen*, one that doesn't is passed over. Running jobs that aren't
chosen are preempted, which adds a restart to the work they still have. Then the chosen ones that wait are
placed, in order; one that finds no place (the quota knows counts, not nodes) goes on waiting.

The published simulators choose in every second. It is enough to choose when something has happened, since
nothing else can change the choice: a running job only moves ahead, and where a chosen job moves ahead of another
chosen one, both still fit; a job that isn't chosen takes nothing from anybody.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from rm.sim.cluster import Pool, whole_gpus
from rm.sim.consolidation import ConsolidatedNodes, Share
from rm.sim.outcomes import JobOutcome, Run
from rm.sim.published import Counted, submit_tick, work_ticks
from rm.sim.trace import TraceJob

RESTART_S = 40
RESTART_LARGE_S = 60
"""Work that a preemption adds, in seconds: up to LARGE_GPUS GPUs, and above."""
LARGE_GPUS = 8


@dataclass(slots=True, eq=False)
class Live:
    """A job between its submission and its end. `order`: when it joined the list that it is in, for ties."""

    number: int
    job: TraceJob
    gpus: int
    submitted: int
    remain: int
    order: int = 0
    started: int = -1
    attained_gpu_s: int = 0
    level: int = 0
    shares: tuple[Share, ...] = ()
    runs: list[Run] = field(default_factory=list)
    restart_s: int = 0

    @property
    def is_running(self) -> bool:
        return self.started >= 0

    @property
    def done(self) -> int:
        """Running only: the second at which nothing remains to be done."""
        return self.started + self.remain


Entry = tuple[int, int, Live]
"""A sort key, the order that breaks its ties (unique), and the job."""


class PreemptivePool:
    """One pool under a preemptive rule: what both policies share. `waiting` and `running` are kept by the rule."""

    def __init__(self, pool: Pool, jobs: list[TraceJob], counted: Counted) -> None:
        self.jobs = jobs
        self.gpus = pool.gpus
        self.nodes = ConsolidatedNodes(pool)
        self.outcomes: list[JobOutcome] = []
        self._counted = counted
        self._arrived = 0
        self._order = 0
        self._ends: list[Entry] = []

    def next_event(self) -> float:
        """The next second in which a job arrives or frees its GPUs."""
        ends = self._ends
        while ends and not (ends[0][2].is_running and ends[0][2].done + 1 == ends[0][0]):
            heapq.heappop(ends)  # it was preempted since
        end = ends[0][0] if ends else math.inf
        arrival = submit_tick(self.jobs[self._arrived]) if self._arrived < len(self.jobs) else math.inf
        return min(end, arrival)

    def ended(self, now: int) -> Iterator[Live]:
        """The jobs whose work is done, their GPUs freed."""
        while self.next_event() <= now and self._ends and self._ends[0][0] <= now:
            live = heapq.heappop(self._ends)[2]
            self._leave(live, now)
            lost = live.restart_s * live.job.num_gpus
            self.outcomes.append(JobOutcome(live.job, tuple(live.runs), lost))
            self._counted.one_more()
            yield live

    def arrivals(self, now: int) -> Iterator[Live]:
        while self._arrived < len(self.jobs) and submit_tick(self.jobs[self._arrived]) <= now:
            job = self.jobs[self._arrived]
            yield self._ordered(Live(self._arrived, job, whole_gpus(job), submit_tick(job), work_ticks(job)))
            self._arrived += 1

    def start(self, live: Live, now: int) -> bool:
        shares = self.nodes.place(live.gpus)
        if shares is None:
            return False
        live.shares, live.started = shares, now
        self._ordered(live)
        heapq.heappush(self._ends, (live.done + 1, live.number, live))
        return True

    def preempt(self, live: Live, now: int) -> None:
        restart = RESTART_S if live.gpus <= LARGE_GPUS else RESTART_LARGE_S
        live.attained_gpu_s += live.gpus * (now - live.started)
        live.remain += live.started - now + restart
        live.restart_s += restart
        self._leave(live, now)
        self._ordered(live)

    def _leave(self, live: Live, now: int) -> None:
        self.nodes.release(live.shares)
        live.runs.append(Run(live.started, now, live.job.num_gpus))
        live.started = -1

    def _ordered(self, live: Live) -> Live:
        self._order += 1
        live.order = self._order
        return live


def insert(entries: list[Entry], key: int, live: Live) -> None:
    insort(entries, (key, live.order, live))


def remove(entries: list[Entry], key: int, live: Live, order: int | None = None) -> None:
    place = bisect_left(entries, (key, live.order if order is None else order), key=lambda each: each[:2])
    assert entries[place][2] is live
    del entries[place]


def choose(
    waiting: list[Entry], running: list[Entry], quota: int, *, lead: int
) -> tuple[list[Live], list[Live], int]:
    """The running jobs to preempt, the waiting ones to place, and what is left of the quota.

    A waiting job comes before a running one whose key is larger than its own by `lead` or more.
    """
    preempted: list[Live] = []
    chosen: list[Live] = []
    queue = iter(waiting)
    head = next(queue, None)
    for key, _, live in running:
        while quota and head is not None and head[0] <= key - lead:
            if head[2].gpus <= quota:
                quota -= head[2].gpus
                chosen.append(head[2])
            head = next(queue, None)
        if live.gpus <= quota:
            quota -= live.gpus
        else:
            preempted.append(live)
    while quota and head is not None:
        if head[2].gpus <= quota:
            quota -= head[2].gpus
            chosen.append(head[2])
        head = next(queue, None)
    return preempted, chosen, quota
