"""What goes into the ledger and what comes out of it, in the core's words."""

from __future__ import annotations

from dataclasses import dataclass, field

from rm.core.capacity import Totals
from rm.core.events import Event
from rm.core.model import Job
from rm.spec import JobSpec


@dataclass(frozen=True, slots=True)
class Accepted:
    """A new job. `key` is the submission's idempotency key, unique in the ledger."""

    job: Job
    spec: JobSpec
    key: str


@dataclass(frozen=True, slots=True)
class EventRow:
    """A durable event with the cluster's GPUs right before and right after it."""

    event: Event
    totals_before: Totals
    totals_after: Totals


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything that one turn of the writer decided: committed as a whole or not at all.

    `changed` holds last records. A job that is accepted and changed in one batch may stand in both.
    """

    accepted: list[Accepted] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)
    changed: list[Job] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an allocator starts from: the jobs that have not ended, by `seq`, and the next free `seq`."""

    jobs: list[Job]
    next_seq: int


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job as the ledger has it, ended or not."""

    job: Job
    spec: JobSpec
