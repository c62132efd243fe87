"""The figures of a replay, as an object, as JSON and as a table.

Definitions, per job: completion time (JCT) from submission to end; queueing delay is the part of it without GPUs.
Makespan: from the first submission to the last end. Utilisation: GPU-seconds held by jobs over those that were
there during the makespan, so restarts and repeated work count as held; `gpu_seconds_lost` says how much that was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def figures_table(rows: Sequence[Figures]) -> Table:
    """One line per policy; times in whole seconds."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("POLICY", no_wrap=True)
    titles = [title for title, _ in _cells(rows[0])] if rows else []
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row.policy, *(text for _, text in _cells(row)))
    return table


def _cells(row: Figures) -> list[tuple[str, str]]:
    return [
        ("JCT MEAN", f"{row.mean_jct_s:,.0f}"),
        ("MEDIAN", f"{row.median_jct_s:,.0f}"),
        ("P95", f"{row.p95_jct_s:,.0f}"),
        ("P99", f"{row.p99_jct_s:,.0f}"),
        ("QUEUE MEAN", f"{row.mean_queue_s:,.0f}"),
        ("MEDIAN", f"{row.median_queue_s:,.0f}"),
        ("P95", f"{row.p95_queue_s:,.0f}"),
        ("P99", f"{row.p99_queue_s:,.0f}"),
        ("MAX", f"{row.max_queue_s:,.0f}"),
        ("MAKESPAN", f"{row.makespan_s:,.0f}"),
        ("USED", f"{row.utilisation:.1%}"),
        ("FTR MEAN", f"{row.mean_ftr:.2f}"),
        ("WORST", f"{row.worst_ftr:,.1f}"),
        ("JAIN", f"{row.jain:.3f}"),
        ("PREEMPTED", f"{row.preemptions:,}"),
        ("GPU-S LOST", f"{row.gpu_seconds_lost:,.0f}"),
        ("NODE-H", f"{row.node_hours:,.0f}"),
    ]
