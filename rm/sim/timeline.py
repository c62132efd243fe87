"""A replay over time: which GPUs were held, by whom, and how many jobs waited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf

from rm.sim.outcomes import JobOutcome, Replay, Sample


def timeline_of(replay: Replay) -> Sequence[Sample]:
    """The replay's own samples, or those that follow from its runs: one for every moment of change, in order."""
    if replay.timeline is not None:
        return replay.timeline
    return samples_of(replay.outcomes, [(-inf, float(replay.cluster.gpus))])


def samples_of(outcomes: Iterable[JobOutcome], sizes: Sequence[tuple[float, float]]) -> list[Sample]:
    """`sizes`: (moment, GPUs that are there from then on), in order. A sample for every moment of change."""
    outcomes = list(outcomes)
    changes: list[tuple[float, int, float, str]] = []
    for each in outcomes:
        queue, waits_since = each.job.queue, each.job.submit_s
        for run in each.runs:
            changes += (
                (waits_since, 1, 0.0, queue),
                (run.start_s, -1, run.gpus, queue),
                (run.end_s, 0, -run.gpus, queue),
            )
            waits_since = run.end_s
    changes += ((at_s, 0, 0.0, "") for at_s, _ in sizes if at_s > -inf)
    changes.sort(key=lambda change: change[0])
    samples: list[Sample] = []
    by_queue = dict.fromkeys(sorted({each.job.queue for each in outcomes}), 0.0)
    waiting, total, resized = 0, 0.0, 0
    for place, (at_s, waits, gpus, queue) in enumerate(changes):
        waiting += waits
        if gpus:
            by_queue[queue] += gpus
        if place + 1 == len(changes) or changes[place + 1][0] > at_s:
            while resized < len(sizes) and sizes[resized][0] <= at_s:
                total = sizes[resized][1]
                resized += 1
            samples.append(Sample(at_s, sum(by_queue.values()), total, waiting, dict(by_queue)))
    return samples


def capacity_gpu_s(replay: Replay, start_s: float, end_s: float) -> float:
    """GPU-seconds that were there between two moments."""
    if replay.timeline is None:
        return replay.cluster.gpus * (end_s - start_s)
    ends = [*(sample.at_s for sample in replay.timeline[1:]), end_s]
    return sum(
        sample.total_gpus * max(0.0, min(until, end_s) - max(sample.at_s, start_s))
        for sample, until in zip(replay.timeline, ends, strict=True)
    )
