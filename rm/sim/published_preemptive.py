"""The preemptive policies of the published simulators: SRTF and Tiresias. The rules of time are in `published`.

Both decide in two steps. First a walk over all jobs, running and waiting, in the policy's order, with the pool's
GPU count as a quota: a job that fits what is left of it is *chosen*, one that doesn't is passed over. Running
jobs that aren't chosen are preempted, which adds a restart to the work they still have. Then the chosen ones
that wait are placed, in order; one that finds no place (the quota knows counts, not nodes) goes on waiting.

The published simulators decide in every second. It is enough to decide when something has happened, since
nothing else can change the choice: a running job only moves ahead, and where a chosen job moves ahead of another
chosen one, both still fit; a job that isn't chosen takes nothing from anybody.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rm.sim.cluster import Pool, SimCluster, whole_gpus
from rm.sim.consolidation import ConsolidatedNodes, Share
from rm.sim.outcomes import JobOutcome, Replay, Run
from rm.sim.policy import Progress, silent
from rm.sim.published import Counted, submit_tick, work_ticks
from rm.sim.trace import TraceJob

RESTART_S = 40
RESTART_LARGE_S = 60
"""Work that a preemption adds, in seconds: up to LARGE_GPUS GPUs, and above."""
LARGE_GPUS = 8
TIRESIAS_SPLIT_GPU_S = 18_000
"""GPU-seconds after which a job moves to the second queue."""
TIRESIAS_INTERVAL_S = 60


@dataclass(slots=True, eq=False)
class _Live:
    """A job between its submission and its end. `order`: when it joined the list that it is in, for ties."""

    number: int
    job: TraceJob
    gpus: int
    submitted: int
    remain: int
    order: int = 0
    started: int = -1
    attained_gpu_s: int = 0
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

    def attained_at(self, now: int) -> int:
        return self.attained_gpu_s + (self.gpus * (now - self.started) if self.is_running else 0)


_Entry = tuple[int, int, _Live]
"""A sort key, the order that breaks its ties (unique), and the job."""


class _PreemptivePool:
    """One pool under a preemptive rule: what both policies share. `waiting` and `running` are kept by the rule."""

    def __init__(self, pool: Pool, jobs: list[TraceJob], counted: Counted) -> None:
        self.jobs = jobs
        self.gpus = pool.gpus
        self.nodes = ConsolidatedNodes(pool)
        self.outcomes: list[JobOutcome] = []
        self._counted = counted
        self._arrived = 0
        self._order = 0
        self._ends: list[_Entry] = []

    def next_event(self) -> float:
        """The next second in which a job arrives or frees its GPUs."""
        ends = self._ends
        while ends and not (ends[0][2].is_running and ends[0][2].done + 1 == ends[0][0]):
            heapq.heappop(ends)  # it was preempted since
        end = ends[0][0] if ends else math.inf
        arrival = submit_tick(self.jobs[self._arrived]) if self._arrived < len(self.jobs) else math.inf
        return min(end, arrival)

    def ended(self, now: int) -> Iterator[_Live]:
        """The jobs whose work is done, their GPUs freed."""
        while self.next_event() <= now and self._ends and self._ends[0][0] <= now:
            live = heapq.heappop(self._ends)[2]
            self._leave(live, now)
            lost = live.restart_s * live.job.num_gpus
            self.outcomes.append(JobOutcome(live.job, tuple(live.runs), lost))
            self._counted.one_more()
            yield live

    def arrivals(self, now: int) -> Iterator[_Live]:
        while self._arrived < len(self.jobs) and submit_tick(self.jobs[self._arrived]) <= now:
            job = self.jobs[self._arrived]
            yield self._ordered(_Live(self._arrived, job, whole_gpus(job), submit_tick(job), work_ticks(job)))
            self._arrived += 1

    def start(self, live: _Live, now: int) -> bool:
        shares = self.nodes.place(live.gpus)
        if shares is None:
            return False
        live.shares, live.started = shares, now
        self._ordered(live)
        heapq.heappush(self._ends, (live.done + 1, live.number, live))
        return True

    def preempt(self, live: _Live, now: int) -> None:
        restart = RESTART_S if live.gpus <= LARGE_GPUS else RESTART_LARGE_S
        live.attained_gpu_s = live.attained_at(now)
        live.remain += live.started - now + restart
        live.restart_s += restart
        self._leave(live, now)
        self._ordered(live)

    def _leave(self, live: _Live, now: int) -> None:
        self.nodes.release(live.shares)
        live.runs.append(Run(live.started, now, live.job.num_gpus))
        live.started = -1

    def _ordered(self, live: _Live) -> _Live:
        self._order += 1
        live.order = self._order
        return live


def _replay_srtf(pool: Pool, jobs: list[TraceJob], counted: Counted) -> list[JobOutcome]:
    state = _PreemptivePool(pool, jobs, counted)
    # Running jobs lose a second of work every second, so the order by remaining work is the order by `done`.
    waiting: list[_Entry] = []
    running: list[_Entry] = []
    while (event := state.next_event()) < math.inf:
        now = int(event)
        for live in state.ended(now):
            _remove(running, (now - 1, live.order, live))
        for live in state.arrivals(now):
            insort(waiting, (live.remain, live.order, live))
        preempted, chosen = _choose(waiting, running, state.gpus, now)
        for live in preempted:
            _remove(running, (live.done, live.order, live))
            state.preempt(live, now)
            insort(waiting, (live.remain, live.order, live))
        for live in chosen:
            entry = (live.remain, live.order, live)
            if state.start(live, now):
                _remove(waiting, entry)
                insort(running, (live.done, live.order, live))
    return state.outcomes


def _remove(entries: list[_Entry], entry: _Entry) -> None:
    del entries[bisect_left(entries, entry[:2], key=lambda each: each[:2])]


def _choose(
    waiting: list[_Entry], running: list[_Entry], quota: int, now: int
) -> tuple[list[_Live], list[_Live]]:
    """The running jobs to preempt and the waiting ones to place, by remaining work, waiting before running."""
    preempted: list[_Live] = []
    chosen: list[_Live] = []
    queue = iter(waiting)
    head = next(queue, None)
    for done, _, live in running:
        while quota and head is not None and head[0] <= done - now:
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
    return preempted, chosen


def _replay_tiresias(pool: Pool, jobs: list[TraceJob], counted: Counted) -> list[JobOutcome]:
    state = _PreemptivePool(pool, jobs, counted)
    waiting: dict[int, _Live] = {}
    running: dict[int, _Live] = {}
    last, changed = 0, False
    while True:
        crossing = min((_crosses(live, last) for live in running.values()), default=math.inf)
        event = min(state.next_event(), crossing)
        if event == math.inf and not changed:
            return state.outcomes
        now = last + TIRESIAS_INTERVAL_S if changed else _boundary(int(event))
        while (earlier := state.next_event()) <= now:
            for live in state.ended(int(earlier)):
                del running[live.number]
            for live in state.arrivals(int(earlier)):
                waiting[live.number] = live
        last = now
        changed = False
        # A job that moves between the two goes to the end of the other, as in a list.
        current = [*running.values(), *waiting.values()]
        current.sort(key=lambda live: (live.attained_at(now) > TIRESIAS_SPLIT_GPU_S, live.submitted))
        quota, preempted, chosen = state.gpus, [], []
        for live in current:
            if live.gpus <= quota:
                quota -= live.gpus
                if not live.is_running:
                    chosen.append(live)
            elif live.is_running:
                preempted.append(live)
        for live in preempted:
            state.preempt(live, now)
            waiting[live.number] = running.pop(live.number)
            changed = True
        for live in chosen:
            if state.start(live, now):
                running[live.number] = waiting.pop(live.number)
                changed = True


def _boundary(second: int) -> int:
    """The first moment of decision at or after it."""
    return -(-second // TIRESIAS_INTERVAL_S) * TIRESIAS_INTERVAL_S


def _crosses(live: _Live, now: int) -> float:
    """The second after `now` in which a running job has attained more than the split; inf if it has already."""
    second = live.started + (TIRESIAS_SPLIT_GPU_S - live.attained_gpu_s) // live.gpus + 1
    return second if second > now else math.inf


@dataclass(frozen=True, slots=True)
class ShortestRemaining:
    """Shortest remaining time first, with exact knowledge: the bound that a clairvoyant scheduler could reach."""

    name: str = "srtf"
    summary: str = "shortest remaining time first (oracle), preempting"

    def replay(self, jobs: Sequence[TraceJob], cluster: SimCluster, progress: Progress = silent) -> Replay:
        counted = Counted(progress)
        split = cluster.split(jobs)
        return Replay(
            self.name,
            cluster,
            [done for pool, own in split for done in _replay_srtf(pool, own, counted)],
        )


@dataclass(frozen=True, slots=True)
class Tiresias:
    """Least attained service in two queues (Gu et al., NSDI '19), as the Lucid simulator has it. Knows nothing."""

    name: str = "tiresias"
    summary: str = "two queues by attained GPU-seconds, preempting every 60 s"

    def replay(self, jobs: Sequence[TraceJob], cluster: SimCluster, progress: Progress = silent) -> Replay:
        counted = Counted(progress)
        split = cluster.split(jobs)
        return Replay(
            self.name,
            cluster,
            [done for pool, own in split for done in _replay_tiresias(pool, own, counted)],
        )


SRTF = ShortestRemaining()
TIRESIAS = Tiresias()
