"""Jobs and batches as the writer makes them."""

from __future__ import annotations

from dataclasses import replace

from rm.core.capacity import Totals
from rm.core.events import Event, JobAdmitted, JobSubmitted
from rm.core.model import Attempt, Gang, Job, Outcome, Phase, PlacedBundle, Status
from rm.core.resources import GPU_UNIT, Bundle
from rm.ledger import Accepted, Batch, EventRow
from rm.spec import JobSpec, build_spec

PLACED = (PlacedBundle("node-1", (0, 1)),)


def totals(charged: int) -> Totals:
    """A cluster of 8 GPUs, `charged` of them ours."""
    return Totals(8 * GPU_UNIT, charged * GPU_UNIT, 0, (8 - charged) * GPU_UNIT)


def make_spec(**fields: object) -> JobSpec:
    return build_spec(**({"kind": "command", "command": ("python", "train.py"), "num_gpus": 2} | fields))


def make_job(seq: int, spec: JobSpec | None = None) -> Job:
    return (spec or make_spec()).job(f"j{seq}", seq, Gang(Bundle(2 * GPU_UNIT)), 1000.0 + seq)


def row(event: Event, before: int = 0, after: int = 0) -> EventRow:
    return EventRow(event, totals(before), totals(after))


def submission(*seqs: int, key: str = "key-{}", **fields: object) -> Batch:
    """What the writer commits when jobs are submitted."""
    spec = make_spec(**fields)
    jobs = [make_job(seq, spec) for seq in seqs]
    return Batch(
        [Accepted(job, spec, key.format(job.seq)) for job in jobs],
        [row(JobSubmitted(job.submitted_at, job)) for job in jobs],
        jobs,
    )


def admitted(job: Job) -> Job:
    attempt = Attempt(1, PLACED, Phase.RESERVING, 2000.0)
    return replace(job, status=Status.RESERVING, attempt=attempt, attempts=1)


def ended(job: Job, status: Status = Status.SUCCEEDED) -> Job:
    return replace(job, status=status, attempt=None, ended_at=3000.0, outcome=Outcome(status, "it is over"))


def admission(*jobs: Job) -> Batch:
    """What the writer commits when jobs are admitted."""
    return Batch(
        events=[row(JobAdmitted(2000.0, job.id, 1, PLACED), 0, 2) for job in jobs],
        changed=[admitted(job) for job in jobs],
    )
