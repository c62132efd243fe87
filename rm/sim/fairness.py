"""Fairness: each job's completion time against the one that an equal share of its pool would have given it.

The equal share is processor sharing: at every moment each job that isn't finished gets an equal part of the
pool's GPUs, at most what it asked for (what small jobs leave goes to the larger ones), and makes progress in
proportion. Nothing waits, nothing is packed, nothing is lost. It depends on the trace and the cluster alone, so
all policies are measured with the same yardstick.

The finish-time ratio of a job is its completion time under the policy over the one under the equal share; above
1 it would have done better with its share. This is the rho of Themis (Mahajan et al., NSDI '20), there against
a fixed part of 1/N. Times below SHORTEST_S count as SHORTEST_S, as in bounded slowdown (Feitelson & Rudolph,
JSSPP '98): a job of one second that waits for a minute would outweigh everything.

Jain's index (Jain, Chiu & Hawe, DEC-TR-301, 1984) is over tenants: the queues, or the users where there is one
queue only. A tenant's value is the inverse of its jobs' mean ratio. 1: all are served alike; 1/n: one is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from rm.sim.cluster import SimCluster
from rm.sim.outcomes import JobOutcome
from rm.sim.trace import TraceJob

SHORTEST_S = 10.0


def equal_share_jct_s(jobs: Sequence[TraceJob], cluster: SimCluster) -> dict[str, float]:
    """The completion time of each job, by its id, if all shared equally. Seconds."""
    return {
        job_id: jct_s
        for pool, own in cluster.split(jobs)
        for job_id, jct_s in _processor_sharing(own, pool.gpus).items()
    }


def finish_time_ratios(outcomes: Iterable[JobOutcome], equal_share: dict[str, float]) -> dict[str, float]:
    """By job id."""
    return {
        each.job.job_id: max(each.jct_s, SHORTEST_S) / max(equal_share[each.job.job_id], SHORTEST_S)
        for each in outcomes
    }


def jains_index(values: Sequence[float]) -> float:
    """1 for equal values, 1/n where one has everything; 1 for none."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def tenants_index(jobs: Iterable[TraceJob], ratios: dict[str, float]) -> float:
    """Jain's index over the queues, or over the users if there is one queue."""
    jobs = list(jobs)
    by_queue = len({job.queue for job in jobs}) > 1
    of_tenant: dict[str, list[float]] = {}
    for job in jobs:
        of_tenant.setdefault(job.queue if by_queue else job.user, []).append(ratios[job.job_id])
    return jains_index([len(each) / sum(each) for each in of_tenant.values()])


def _processor_sharing(jobs: Sequence[TraceJob], gpus: int) -> dict[str, float]:
    """Event by event. Jobs of one size progress alike, so each size has one clock of the work done per job."""
    sizes = sorted({job.num_gpus for job in jobs})
    clock = dict.fromkeys(sizes, 0.0)
    ends: dict[float, list[tuple[float, int]]] = {size: [] for size in sizes}
    done: dict[str, float] = {}
    now, arrived = 0.0, 0
    while arrived < len(jobs) or len(done) < len(jobs):
        rates = _rates({size: len(each) for size, each in ends.items() if each}, gpus)
        arrival = jobs[arrived].submit_s if arrived < len(jobs) else math.inf
        finish, first = math.inf, 0.0
        for size, rate in rates.items():
            at = now + max(0.0, ends[size][0][0] - clock[size]) / rate
            if at < finish:
                finish, first = at, size
        then = min(arrival, finish)
        for size, rate in rates.items():
            clock[size] += (then - now) * rate
        now = then
        if finish <= arrival:
            clock[first] = max(clock[first], ends[first][0][0])  # not left behind by a rounding error
            while ends[first] and ends[first][0][0] <= clock[first]:
                _, number = heapq.heappop(ends[first])
                done[jobs[number].job_id] = now - jobs[number].submit_s
        else:
            job = jobs[arrived]
            heapq.heappush(ends[job.num_gpus], (clock[job.num_gpus] + job.duration_s, arrived))
            arrived += 1
    return done


def _rates(counts: dict[float, int], gpus: int) -> dict[float, float]:
    """Seconds of work per second for each size: the GPUs are shared equally, nobody gets more than it asked."""
    left, sharers = float(gpus), sum(counts.values())
    rates: dict[float, float] = {}
    for size in sorted(counts):
        share = min(size, left / sharers)
        rates[size] = share / size
        left -= share * counts[size]
        sharers -= counts[size]
    return rates
