"""Jobs and batches as the writer makes them."""

from __future__ import annotations

from dataclasses import replace

from rm.core.capacity import Totals
from rm.core.effects import Effect
from rm.core.events import Event, JobAdmitted, JobSubmitted
from rm.core.model import Attempt, Gang, Job, Kind, Outcome, Phase, PlacedBundle, Status
from rm.core.policy import Policy
from rm.core.resources import GPU_UNIT, Bundle
from rm.ledger import Accepted, Batch, EventRow
from rm.spec import JobSpec, build_spec
from rm.testing import Behaviour, FakeCluster

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


def array_of(size: int, seq: int, **fields: object) -> Batch:
    """What the writer commits when an array is submitted whose first job has number `seq`."""
    spec = make_spec(array=size, **fields)
    jobs = [
        replace(make_job(seq + index, spec), id=f"j{seq}_{index}", array=f"j{seq}", array_index=index)
        for index in range(size)
    ]
    return Batch(
        [Accepted(job, spec, f"key-{job.id}") for job in jobs],
        [row(JobSubmitted(job.submitted_at, job)) for job in jobs],
        jobs,
    )


class Recorder(FakeCluster):
    """A fake cluster that keeps what the writer would write: `rows`, and each job's latest record."""

    def __init__(self, policy: Policy | None = None) -> None:
        super().__init__(policy=policy or Policy())
        self.rows: list[EventRow] = []

    def _apply(self, event: Event) -> list[Effect]:
        version, before = self.state.version, self.state.totals()
        effects = super()._apply(event)
        if self.state.version != version and event.durable:
            self.rows.append(EventRow(event, before, self.state.totals()))
        return effects

    def records(self) -> list[Job]:
        return sorted([*self.ended.values(), *self.state.jobs.values()], key=lambda job: job.seq)

    def batch(self) -> Batch:
        """All of it, as one batch."""
        spec, jobs = make_spec(), self.records()
        return Batch([Accepted(job, spec, f"key-{job.id}") for job in jobs], self.rows, jobs)


def told_story() -> Recorder:
    """j1 succeeds, j2 after one retry and a lost runner, j3 is cancelled while queued and j4, which needs it, with it;
    j5 is a lease whose node is lost; j6 runs, j7 waits for it, j8 is stopping.
    """
    fake = Recorder()
    fake.add_node("n1", 4)
    fake.add_node("n2", 1)
    fake.submit(1, behaviour=Behaviour(5))
    fake.submit(2, behaviour=Behaviour(5, ("fail", "lost", "ok")), max_retries=1)
    fake.submit(8, held=True)
    fake.submit(1, after=("j3",))
    fake.submit(1, kind=Kind.LEASE, behaviour=Behaviour(1000), max_retries=1)
    fake.run(lambda: len(fake.ended) == 2)
    fake.cancel("j3")
    lease = fake.state.jobs["j5"].attempt
    assert lease is not None
    fake.lose_node(lease.placed[0].node_id)
    fake.run(lambda: not fake.state.jobs)
    fake.add_node("n3", 4)
    fake.submit(1, behaviour=Behaviour(1000))
    fake.submit(1, after=("j6",))
    fake.submit(1, behaviour=Behaviour(1000))
    fake.run(lambda: fake.now > 200)
    fake.cancel("j8")
    return fake
