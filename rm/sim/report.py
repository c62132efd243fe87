"""The figures of a replay, as an object, as JSON and as a table.

Definitions, per job: completion time (JCT) from submission to end; queueing delay is the part of it without GPUs.
Makespan: from the first submission to the last end. Utilisation: GPU-seconds held by jobs over those that were
there during the makespan, so restarts and repeated work count as held; `gpu_seconds_lost` says how much that was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from rm.sim.fairness import equal_share_jct_s, finish_time_ratios, tenants_index
from rm.sim.outcomes import Replay
from rm.sim.timeline import capacity_gpu_s


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy on one trace and cluster. Names end in their unit; ratios have none."""

    policy: str
    mean_jct_s: float
    median_jct_s: float
    p95_jct_s: float
    p99_jct_s: float
    mean_queue_s: float
    median_queue_s: float
    p95_queue_s: float
    p99_queue_s: float
    max_queue_s: float
    makespan_s: float
    utilisation: float
    worst_ftr: float
    mean_ftr: float
    jain: float
    preemptions: int
    gpu_seconds_lost: float
    node_hours: float
    jobs: int

    def to_dict(self) -> dict[str, float | str]:
        return asdict(self)


def figures_of(replay: Replay, equal_share: dict[str, float] | None = None) -> Figures:
    """`equal_share`: completion times by job id, where they are known already (they cost as much as a replay)."""
    outcomes = replay.outcomes
    jobs = sorted((each.job for each in outcomes), key=lambda job: job.submit_s)
    if equal_share is None:
        equal_share = equal_share_jct_s(jobs, replay.cluster)
    ratios = finish_time_ratios(outcomes, equal_share)
    jcts = sorted(each.jct_s for each in outcomes)
    queues = sorted(each.queue_s for each in outcomes)
    start_s, end_s = jobs[0].submit_s, max(each.end_s for each in outcomes)
    held = sum(run.gpus * (run.end_s - run.start_s) for each in outcomes for run in each.runs)
    there = capacity_gpu_s(replay, start_s, end_s)
    return Figures(
        policy=replay.policy,
        mean_jct_s=math.fsum(jcts) / len(jcts),
        median_jct_s=quantile(jcts, 0.5),
        p95_jct_s=quantile(jcts, 0.95),
        p99_jct_s=quantile(jcts, 0.99),
        mean_queue_s=math.fsum(queues) / len(queues),
        median_queue_s=quantile(queues, 0.5),
        p95_queue_s=quantile(queues, 0.95),
        p99_queue_s=quantile(queues, 0.99),
        max_queue_s=queues[-1],
        makespan_s=end_s - start_s,
        utilisation=held / there if there else 0.0,
        worst_ftr=max(ratios.values()),
        mean_ftr=math.fsum(ratios.values()) / len(ratios),
        jain=tenants_index(jobs, ratios),
        preemptions=sum(each.preemptions for each in outcomes),
        gpu_seconds_lost=math.fsum(each.lost_gpu_s for each in outcomes),
        node_hours=replay.node_hours,
        jobs=len(outcomes),
    )


def quantile(ascending: Sequence[float], share: float) -> float:
    """Between the two nearest values in proportion, as NumPy's default does."""
    place = share * (len(ascending) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (place - below)


def figures_table(columns: Sequence[Figures]) -> Table:
    """One column per policy, so that figures to compare stand side by side."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for each in columns:
        table.add_column(each.policy, justify="right", no_wrap=True)
    for title, form, value in LINES:
        table.add_row(title, *(form.format(value(each)) for each in columns))
    return table


LINES: tuple[tuple[str, str, Callable[[Figures], float]], ...] = (
    ("completion time, mean s", "{:,.0f}", lambda each: each.mean_jct_s),
    ("  median", "{:,.0f}", lambda each: each.median_jct_s),
    ("  P95", "{:,.0f}", lambda each: each.p95_jct_s),
    ("  P99", "{:,.0f}", lambda each: each.p99_jct_s),
    ("queueing delay, mean s", "{:,.0f}", lambda each: each.mean_queue_s),
    ("  median", "{:,.0f}", lambda each: each.median_queue_s),
    ("  P95", "{:,.0f}", lambda each: each.p95_queue_s),
    ("  P99", "{:,.0f}", lambda each: each.p99_queue_s),
    ("  longest", "{:,.0f}", lambda each: each.max_queue_s),
    ("makespan, s", "{:,.0f}", lambda each: each.makespan_s),
    ("utilisation", "{:.1%}", lambda each: each.utilisation),
    ("finish-time ratio, mean", "{:,.2f}", lambda each: each.mean_ftr),
    ("  worst", "{:,.1f}", lambda each: each.worst_ftr),
    ("Jain's index", "{:.3f}", lambda each: each.jain),
    ("preemptions", "{:,}", lambda each: each.preemptions),
    ("GPU-seconds lost", "{:,.0f}", lambda each: each.gpu_seconds_lost),
    ("node-hours bought", "{:,.1f}", lambda each: each.node_hours),
)
"""Title, format and value of each line."""
