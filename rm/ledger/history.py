"""Whether the events of a ledger tell stories that can have happened, and whether the records agree with their ends.

A second opinion on the rules of `rm.core.state`, in a smaller form and on purpose not the same code: `check` finds
out with it whether what was written is what the rules allow. Two things happen to jobs without an event of their own:
the loss of a node ends the run of a lease there, and the end of a job cancels those that needed its success.

After something impossible the replay goes on as if it had happened, so that one damage is told once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rm.core.events import (
    AvailabilityChecked,
    Event,
    GangCut,
    JobAdmitted,
    JobSubmitted,
    NodeLost,
    PlacementReady,
    PlacementReleased,
    ReserveFailed,
    RunExited,
    RunLost,
    RunStarted,
    StopRequested,
)
from rm.core.model import Job, Kind, Outcome, Phase, Status, StopCause

Report = Callable[[str, str, int, str], None]
"""Called with what it is about, the job's id, the event's number, and the words."""

HISTORY, OVERLAP, AFTER_END, STATUS = "history", "overlap", "after_end", "status"

_ALLOWED: dict[type, tuple[Phase | None, ...]] = {
    AvailabilityChecked: (None,),
    GangCut: (None,),
    JobAdmitted: (None,),
    PlacementReady: (Phase.RESERVING,),
    ReserveFailed: (Phase.RESERVING,),
    RunStarted: (Phase.STARTING,),
    RunExited: (Phase.STARTING, Phase.RUNNING),
    RunLost: (Phase.STARTING, Phase.RUNNING),
    PlacementReleased: (Phase.RELEASING,),
}
"""None: no attempt, the job is queued. Events that are not here may come at any time before the end."""

_STOPPED = {
    StopCause.CANCELLED: Status.CANCELLED,
    StopCause.TIME_LIMIT: Status.TIMED_OUT,
    StopCause.HOLDER_LOST: Status.CANCELLED,
    StopCause.RELEASED: Status.SUCCEEDED,
}
_LOST = Outcome(Status.FAILED, infra=True)


@dataclass(slots=True)
class Life:
    """One job as its events tell it so far. `known` is False where an event of it can't be read or is missing."""

    last: int
    """Number of its latest event."""
    known: bool = True
    lease: bool = False
    retries: int = 0
    infra_retries: int = 0
    after: frozenset[str] = frozenset()
    phase: Phase | None = None
    attempt: int = 0
    nodes: frozenset[str] = frozenset()
    stop: StopCause | None = None
    outcome: Outcome | None = None
    failures: int = 0
    infra_failures: int = 0
    evictions: int = 0
    end: Status | None = None

    @property
    def status(self) -> Status:
        """What the record must say."""
        if self.end is not None:
            return self.end
        if self.phase is None:
            return Status.QUEUED
        if self.stop is not None or self.phase is Phase.RELEASING:
            return Status.STOPPING
        return Status.RUNNING if self.phase is Phase.RUNNING else Status.RESERVING


class History:
    """Takes the events of a ledger in their order, then the record of each job."""

    def __init__(self, report: Report) -> None:
        self.lives: dict[str, Life] = {}
        self._report = report
        self._waiting: dict[str, set[str]] = {}
        """Job → the jobs that need its success."""
        self._leases: set[str] = set()

    def add(self, seq: int, event: Event) -> None:
        """The next event, whose number is `seq`."""
        if isinstance(event, NodeLost):
            for lease in map(self.lives.__getitem__, self._leases):
                if event.node_id in lease.nodes and lease.phase in (Phase.STARTING, Phase.RUNNING):
                    lease.phase, lease.outcome = Phase.RELEASING, _LOST
        elif isinstance(event, JobSubmitted):
            self._submitted(seq, event.job)
        elif event.job_id is not None:
            life = self.lives.get(event.job_id)
            if life is None:
                self._report(HISTORY, event.job_id, seq, f"{_name(event)} comes before the job was submitted")
                life = self.lives[event.job_id] = Life(seq, known=False)
            self._judge(seq, event, event.job_id, life)
            life.last = seq
            if getattr(event, "attempt", life.attempt) >= life.attempt and life.end is None:
                self._apply(event, event.job_id, life)

    def unreadable(self, seq: int, job_id: str) -> None:
        """An event of the job can't be read: what follows can't be judged by it."""
        life = self.lives.setdefault(job_id, Life(seq))
        life.known, life.last = False, seq

    def compare(self, job: Job) -> None:
        """The job's record against its events. Called once all events were added."""
        life = self.lives.get(job.id)
        if life is None:
            self._report(HISTORY, job.id, 0, "it has a record and no event: its submission is missing")
            return
        if not life.known:
            return
        said = {
            "status": (job.status, life.status),
            "attempts": (job.attempts, life.attempt),
            "failures": (job.failures, life.failures),
            "infra_failures": (job.infra_failures, life.infra_failures),
            "evictions": (job.evictions, life.evictions),
            "phase": (job.attempt.phase if job.attempt else None, life.phase),
            "attempt": (job.attempt.number if job.attempt else 0, life.attempt if life.phase else 0),
            "ended": (job.ended_at is not None, life.end is not None),
        }
        wrong = [
            f"{name} {_word(ours)}, not {_word(told)}" for name, (ours, told) in said.items() if ours != told
        ]
        if wrong:
            self._report(
                STATUS, job.id, life.last, f"the record disagrees with the events: {'; '.join(wrong)}"
            )

    # --- what is allowed -----------------------------------------------------------------------------------

    def _judge(self, seq: int, event: Event, job_id: str, life: Life) -> None:
        number = getattr(event, "attempt", None)
        of = _name(event) + (f" of attempt {number}" if number is not None else "")
        allowed = _ALLOWED.get(type(event))
        state = f"attempt {life.attempt} is {life.phase}" if life.phase else "it is queued"
        if life.end is not None:
            self._report(
                AFTER_END, job_id, seq, f"{of} comes after it had ended {life.end} (event {life.last})"
            )
        elif not life.known:
            return
        elif isinstance(event, JobAdmitted) and life.phase is not None:
            self._report(
                OVERLAP, job_id, seq, f"attempt {number} was admitted while {state}: its GPUs were not back"
            )
        elif isinstance(event, JobAdmitted) and number != life.attempt + 1:
            self._report(HISTORY, job_id, seq, f"attempt {number} was admitted after attempt {life.attempt}")
        elif isinstance(event, JobAdmitted) and life.after:
            self._report(
                HISTORY, job_id, seq, f"{of} comes while it waits for {', '.join(sorted(life.after))}"
            )
        elif allowed is not None and life.phase not in allowed:
            self._report(HISTORY, job_id, seq, f"{of} comes while {state}")
        elif number is not None and not isinstance(event, JobAdmitted) and number != life.attempt:
            what = OVERLAP if number > life.attempt else HISTORY
            self._report(what, job_id, seq, f"{of} comes while {state}")
        elif isinstance(event, StopRequested) and not _counts(event.cause, life):
            self._report(
                HISTORY, job_id, seq, f"{of} ({event.cause}) changes nothing and would not be recorded"
            )

    # --- what becomes true ---------------------------------------------------------------------------------

    def _submitted(self, seq: int, job: Job) -> None:
        life = self.lives.get(job.id)
        if life is not None:
            self._report(HISTORY, job.id, seq, f"JobSubmitted comes again, after event {life.last}")
            return
        self.lives[job.id] = Life(
            seq,
            lease=job.kind is Kind.LEASE,
            retries=job.max_retries,
            infra_retries=job.max_infra_retries,
            after=frozenset(job.after),
        )
        for other in job.after:
            self._waiting.setdefault(other, set()).add(job.id)

    def _apply(self, event: Event, job_id: str, life: Life) -> None:
        life.attempt = getattr(event, "attempt", life.attempt)
        match event:
            case JobAdmitted():
                life.phase, life.stop, life.outcome = Phase.RESERVING, None, None
                life.nodes = frozenset(each.node_id for each in event.placed)
                if life.lease:
                    self._leases.add(job_id)
            case PlacementReady():
                life.phase = Phase.STARTING if life.stop is None else Phase.RELEASING
                life.outcome = None if life.stop is None else Outcome(Status.CANCELLED)
            case ReserveFailed():
                life.phase, life.outcome = Phase.RELEASING, Outcome(Status.QUEUED)
            case RunStarted():
                life.phase = Phase.RUNNING
            case RunExited():
                life.phase, life.outcome = Phase.RELEASING, event.outcome
            case RunLost():
                life.phase, life.outcome = Phase.RELEASING, _LOST
            case StopRequested() if life.phase is not None:
                life.stop = event.cause
            case StopRequested() if not event.cause.comes_back:
                self._end(job_id, life, _STOPPED[event.cause])
            case PlacementReleased():
                self._released(job_id, life)
            case _:
                pass  # neither its phase nor its end changes

    def _released(self, job_id: str, life: Life) -> None:
        outcome = life.outcome or _LOST
        verdict = _verdict(life, outcome)
        evicted = life.stop is not None and life.stop.comes_back
        life.phase, life.nodes = None, frozenset()
        life.stop = life.outcome = None
        self._leases.discard(job_id)
        if verdict is not None:
            self._end(job_id, life, verdict)
        elif evicted:
            life.evictions += 1
        else:
            life.infra_failures += outcome.infra
            life.failures += not outcome.infra and outcome.status is Status.FAILED

    def _end(self, job_id: str, life: Life, status: Status) -> None:
        """The job's end, and that of the jobs which can now never start."""
        ending = [(job_id, life, status)]
        while ending:
            name, each, how = ending.pop()
            each.end, each.phase = how, None
            for other in self._waiting.pop(name, ()):
                waits = self.lives[other]
                waits.after -= {name}
                if how is not Status.SUCCEEDED and waits.end is None:
                    ending.append((other, waits, Status.CANCELLED))


def _verdict(life: Life, outcome: Outcome) -> Status | None:
    """How the job has ended with this attempt, or None where it is queued again."""
    succeeded = outcome.status is Status.SUCCEEDED
    if life.stop is not None and not life.stop.comes_back:
        return _STOPPED[life.stop]
    if life.stop is not None:
        return Status.SUCCEEDED if succeeded and not life.lease else None
    if succeeded:
        return Status.SUCCEEDED
    if outcome.status is Status.QUEUED:
        return None
    tried_again = (
        not life.lease and life.infra_failures < life.infra_retries
        if outcome.infra
        else life.failures < life.retries
    )
    return None if tried_again else Status.FAILED


def _counts(cause: StopCause, life: Life) -> bool:
    """Whether a stop changes anything: the first does, and one that forbids the requeue which another left open."""
    if life.phase is None:
        return not cause.comes_back
    if life.phase is not Phase.RELEASING and life.stop is None:
        return True
    # The first versions recorded it for an attempt that had succeeded, too.
    return (life.stop is None or life.stop.comes_back) and not cause.comes_back


def _name(event: Event) -> str:
    return type(event).__name__


def _word(value: object) -> str:
    return "none" if value is None else str(value)
