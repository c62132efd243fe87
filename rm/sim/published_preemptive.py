"""The preemptive policies of the published simulators: SRTF and Tiresias.

The rules of time are in `published`, those of preemption in `preemption`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rm.sim.cluster import Pool, SimCluster
from rm.sim.outcomes import JobOutcome, Replay
from rm.sim.policy import Progress, silent
from rm.sim.preemption import Entry, Live, PreemptivePool, choose, insert, remove
from rm.sim.published import Counted
from rm.sim.trace import TraceJob

TIRESIAS_SPLIT_GPU_S = 18_000
"""GPU-seconds after which a job moves to the second queue."""
TIRESIAS_INTERVAL_S = 60


def _replay_srtf(pool: Pool, jobs: list[TraceJob], counted: Counted) -> list[JobOutcome]:
    """Shortest remaining time first, with exact knowledge: the bound that a clairvoyant scheduler could reach."""
    state = PreemptivePool(pool, jobs, counted)
    # Running jobs lose a second of work every second, so the order by remaining work is the order by `done`.
    waiting: list[Entry] = []
    running: list[Entry] = []
    while (event := state.next_event()) < math.inf:
        now = int(event)
        for live in state.ended(now):
            remove(running, now - 1, live)
        for live in state.arrivals(now):
            insert(waiting, live.remain, live)
        # A waiting job comes before a running one with as much to do.
        preempted, chosen, _ = choose(waiting, running, state.gpus, lead=now)
        for live in preempted:
            remove(running, live.done, live)
            state.preempt(live, now)
            insert(waiting, live.remain, live)
        for live in chosen:
            waited = live.order
            if state.start(live, now):
                remove(waiting, live.remain, live, waited)
                insert(running, live.done, live)
    return state.outcomes


class _Levels:
    """Tiresias' two queues, the favoured first; in each, waiting and running jobs by submission."""

    def __init__(self) -> None:
        self.waiting: tuple[list[Entry], list[Entry]] = ([], [])
        self.running: tuple[list[Entry], list[Entry]] = ([], [])
        self._crossings: list[Entry] = []

    def wait(self, live: Live) -> None:
        insert(self.waiting[live.level], live.submitted, live)

    def run(self, live: Live, waited: int) -> None:
        """From waiting, where it had the order `waited`, to running."""
        remove(self.waiting[live.level], live.submitted, live, waited)
        insert(self.running[live.level], live.submitted, live)
        if not live.level:
            second = live.started + (TIRESIAS_SPLIT_GPU_S - live.attained_gpu_s) // live.gpus + 1
            heapq.heappush(self._crossings, (second, live.order, live))

    def leave(self, live: Live) -> None:
        """A running one ends or is preempted; its order is still that of its start."""
        remove(self.running[live.level], live.submitted, live)

    def next_crossing(self) -> float:
        """The second in which a running job has attained more than the split."""
        crossings = self._crossings
        while crossings and not (crossings[0][2].is_running and crossings[0][2].order == crossings[0][1]):
            heapq.heappop(crossings)  # it was preempted since, or has ended
        return crossings[0][0] if crossings else math.inf

    def cross(self, now: int) -> None:
        """Move those that have attained enough to the second queue."""
        while self.next_crossing() <= now:
            live = heapq.heappop(self._crossings)[2]
            self.leave(live)
            live.level = 1
            insert(self.running[1], live.submitted, live)


def _replay_tiresias(pool: Pool, jobs: list[TraceJob], counted: Counted) -> list[JobOutcome]:
    """Least attained service in two queues (Gu et al., NSDI '19), as the Lucid simulator has it. Knows nothing."""
    state = PreemptivePool(pool, jobs, counted)
    levels = _Levels()
    last, changed = 0, False
    while True:
        event = min(state.next_event(), levels.next_crossing())
        if changed:  # ties may fall otherwise now: decide again
            now = last + TIRESIAS_INTERVAL_S
        elif event < math.inf:
            now = -(-int(event) // TIRESIAS_INTERVAL_S) * TIRESIAS_INTERVAL_S
        else:
            return state.outcomes
        while (earlier := state.next_event()) <= now:
            for live in state.ended(int(earlier)):
                levels.leave(live)
            for live in state.arrivals(int(earlier)):
                levels.wait(live)
        levels.cross(now)
        changed, last, quota = False, now, state.gpus
        preempted: list[Live] = []
        chosen: list[Live] = []
        for level in (0, 1):
            # A running job comes before a waiting one of the same second.
            out, into, quota = choose(levels.waiting[level], levels.running[level], quota, lead=1)
            preempted += out
            chosen += into
        for live in preempted:
            levels.leave(live)
            state.preempt(live, now)
            levels.wait(live)
            changed = True
        for live in chosen:
            waited = live.order
            if state.start(live, now):
                levels.run(live, waited)
                changed = True


@dataclass(frozen=True, slots=True)
class Preemptive:
    """A policy that is played in each pool by itself."""

    name: str
    summary: str
    replay_pool: Callable[[Pool, list[TraceJob], Counted], list[JobOutcome]]

    def replay(self, jobs: Sequence[TraceJob], cluster: SimCluster, progress: Progress = silent) -> Replay:
        counted = Counted(progress)
        outcomes: list[JobOutcome] = []
        for pool, own in cluster.split(jobs):
            outcomes += self.replay_pool(pool, own, counted)
        return Replay(self.name, cluster, outcomes)


SRTF = Preemptive("srtf", "shortest remaining time first (oracle), preempting", _replay_srtf)
TIRESIAS = Preemptive(
    "tiresias", "two queues by attained GPU-seconds, preempting every 60 s", _replay_tiresias
)
