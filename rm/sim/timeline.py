"""A replay over time: which GPUs were held, by whom, and how many jobs waited."""

from __future__ import annotations

from collections.abc import Sequence

from rm.sim.outcomes import Replay, Sample


def timeline_of(replay: Replay) -> Sequence[Sample]:
    """The replay's own samples, or those that follow from its runs: one for every moment of change, in order."""
    if replay.timeline is not None:
        return replay.timeline
    changes: list[tuple[float, int, float, str]] = []
    for each in replay.outcomes:
        queue, waits_since = each.job.queue, each.job.submit_s
        for run in each.runs:
            changes += (
                (waits_since, 1, 0.0, queue),
                (run.start_s, -1, run.gpus, queue),
                (run.end_s, 0, -run.gpus, queue),
            )
            waits_since = run.end_s
    changes.sort(key=lambda change: change[0])
    samples: list[Sample] = []
    by_queue = dict.fromkeys(sorted({each.job.queue for each in replay.outcomes}), 0.0)
    waiting, total = 0, float(replay.cluster.gpus)
    for place, (at_s, waits, gpus, queue) in enumerate(changes):
        waiting += waits
        by_queue[queue] += gpus
        if place + 1 == len(changes) or changes[place + 1][0] > at_s:
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
