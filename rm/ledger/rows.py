"""What goes into the ledger and what comes out of it, in the core's words."""

from __future__ import annotations

from dataclasses import dataclass, field

from rm.core.books import Owner
from rm.core.capacity import Totals
from rm.core.events import Event, NodeJoined
from rm.core.fairshare import Usage
from rm.core.model import Cordon, Job
from rm.core.policy import Policy
from rm.spec import JobSpec


@dataclass(frozen=True, slots=True)
class Accepted:
    """A new job. `key` is the submission's idempotency key, unique in the ledger.

    `spec_text`: `codec.encode_spec(spec)`, where it has been done already.
    """

    job: Job
    spec: JobSpec
    key: str
    spec_text: str = field(default="", repr=False)  # env may hold secrets


@dataclass(frozen=True, slots=True)
class EventRow:
    """A durable event with the cluster's GPUs right before and right after it."""

    event: Event
    totals_before: Totals
    totals_after: Totals


@dataclass(frozen=True, slots=True)
class AppliedPolicy:
    """The rules in force, the rm.yaml that they came from, and who applied it when."""

    policy: Policy
    text: str = ""
    by: str = ""
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything that one turn of the writer decided: committed as a whole or not at all.

    `changed` holds last records. A job that is accepted and changed in one batch may stand in both. `usage`: the
    owners' averages that changed. `policy`: the rules, where the batch changed them. `cordons`: by node id those that
    changed, None where one was lifted.
    """

    accepted: list[Accepted] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)
    changed: list[Job] = field(default_factory=list)
    usage: list[tuple[Owner, Usage]] = field(default_factory=list)
    policy: AppliedPolicy | None = None
    cordons: dict[str, Cordon | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an allocator starts from: the jobs that have not ended, by `seq`, and the next free `seq`.

    `ended`: the latest ended jobs, oldest first, from which durations are learnt. `policy`: None where none was
    ever applied. `nodes`: those that the history leaves in the cluster, by id, as they joined it.
    """

    jobs: list[Job]
    next_seq: int
    usage: list[tuple[Owner, Usage]] = field(default_factory=list)
    ended: list[Job] = field(default_factory=list)
    policy: AppliedPolicy | None = None
    cordons: list[Cordon] = field(default_factory=list)
    nodes: dict[str, NodeJoined] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job as the ledger has it, ended or not."""

    job: Job
    spec: JobSpec
