"""A ledger's ended jobs as a trace: what was submitted here, to be replayed under other rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from rm.core.model import Job
from rm.core.resources import gpu_count
from rm.errors import InvalidSpec
from rm.sim.trace import TraceJob


def trace_of(records: Iterable[Job], last_starts: Mapping[str, float]) -> tuple[list[TraceJob], Counter[str]]:
    """The jobs that have run and ended, by submission, and why others were left out.

    `last_starts`: when the last attempt started, for jobs that had several. A duration is what their checkpoints
    kept of earlier attempts and the last attempt: what the job would have taken undisturbed. Raises InvalidSpec
    where nothing is left.
    """
    ended: list[tuple[Job, float]] = []
    dropped: Counter[str] = Counter()
    for job in records:
        if job.ended_at is None:
            dropped["have not ended"] += 1
        elif job.first_started_at is None:
            dropped["never ran"] += 1
        elif not job.gang.gpu_units:
            dropped["had no GPUs"] += 1
        else:
            since = last_starts.get(job.id, job.first_started_at)
            ended.append((job, job.ran_s + max(0.0, job.ended_at - since)))
    if not ended:
        raise InvalidSpec("from_ledger: no job in the ledger has run and ended yet", field="from_ledger")
    ended.sort(key=lambda each: (each[0].submitted_at, each[0].seq))
    first_s = ended[0][0].submitted_at
    return [
        TraceJob(
            job_id=job.id,
            submit_s=job.submitted_at - first_s,
            duration_s=duration_s,
            num_gpus=gpu_count(job.gang.gpu_units),
            user=job.owner,
            queue=job.queue,
            gpu_type="|".join(job.gang.gpu_types),
            final_state=str(job.status),
            name=job.name,
            priority=job.priority,
            time_limit_s=job.time_limit_s,
            bundles=job.gang.count,
        )
        for job, duration_s in ended
    ], dropped
