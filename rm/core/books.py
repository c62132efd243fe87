"""What follows from the job records: who holds what, until when, and who waits for whom.

Nothing here is a fact of its own. `ClusterState` tells `changed(old, new)` of every record that it replaces, and
these books follow; made afresh from the records they must come out the same (`ClusterState.check` does that).
The one exception is the owners' decayed usage, which has a past: it is kept in the ledger beside the jobs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from math import inf

from rm.core.fairshare import Usage
from rm.core.model import Attempt, Job, Phase
from rm.core.policy import Policy
from rm.core.predict import Predictor
from rm.core.quota import QuotaTree

START_S = 5.0
"""What a plan allows between an admission and the first line of user code, which starts the time limit."""
Owner = tuple[str, str]
"""(queue, owner)."""


class Books:
    """Derived accounts of all live jobs under one policy."""

    def __init__(self, policy: Policy, capacity: Mapping[str, int], predictor: Predictor) -> None:
        self._policy = policy
        self._predictor = predictor
        self.quota = QuotaTree(policy, capacity)
        self.usage: dict[Owner, Usage] = {}
        self.charged_on: dict[str, set[str]] = {}
        """Node id → jobs whose live attempt is charged there."""
        self.ends: list[tuple[float, int, str]] = []
        """(planned end, seq, id) of every attempt that is not ending yet, in order; endless ones at the end."""
        self._end_of: dict[str, float] = {}
        self.ending: dict[str, None] = {}
        """Attempts that were told to stop or are being released: their GPUs are on the way back."""
        self.deadlines: list[tuple[float, str]] = []
        """(moment, id) of every running job that its time limit ends, in order."""
        self.dependents: dict[str, set[str]] = {}
        self.evictable: dict[str, dict[int, int]] = {}
        """Queue → priority → how many attempts may be evicted, `min_runtime` aside."""
        self.runs: dict[str, dict[str, None]] = {}
        """Queue → its attempts that are not ending."""
        self.elastic: dict[str, None] = {}
        """Attempts that hold more bundles than their gang's minimum."""
        self.moves = 0
        """Grows whenever GPUs change hands, or are on their way back."""
        self.gains = 0
        """The same, but for admissions: as long as it stays nothing has come back and no node has changed."""
        self.unchecked: dict[str, None] = {}
        """Queued jobs that no cycle has looked at."""

    def changed(self, old: Job | None, new: Job | None, now: float) -> None:
        """A record was replaced. `old`: None where the job is new; `new`: None where it has ended."""
        before = old.attempt if old is not None else None
        after = new.attempt if new is not None else None
        if old is not None and before is not None and (after is None or before.placed is not after.placed):
            self._charge(old, before, -1, now)
        if new is not None and after is not None and (before is None or before.placed is not after.placed):
            self._charge(new, after, +1, now)
        if old is not None and before is not None:
            self._forget_run(old, before)
        if new is not None and after is not None:
            self._note_run(new, after)
        if old is not None and old.after and (new is None or new.after is not old.after):
            for other in old.after:
                waiting = self.dependents.get(other)
                if waiting is not None:
                    waiting.discard(old.id)
                    if not waiting:
                        del self.dependents[other]
        if new is not None and new.after and (old is None or new.after is not old.after):
            for other in new.after:
                self.dependents.setdefault(other, set()).add(new.id)
        if new is not None and after is None and new.reason is None:
            self.unchecked[new.id] = None
        elif old is not None:
            self.unchecked.pop(old.id, None)

    def nodes_moved(self) -> None:
        """A node came, went, or offers something else than before."""
        self.moves += 1
        self.gains += 1

    def kind(self, attempt: Attempt) -> str:
        return self.quota.kind(attempt.gpu_type)

    def planned_end(self, job: Job) -> float:
        """When the attempt's GPUs come back at the latest by what is known; infinite without a time limit."""
        return self._end_of.get(job.id, inf)

    def charged_jobs(self) -> Iterator[str]:
        """Every job with a live attempt that is not ending, by planned end."""
        return (job_id for _, _, job_id in self.ends)

    def held_by(self, queue: str, owner: str) -> int:
        """Units that the owner holds in the queue."""
        usage = self.usage.get((queue, owner))
        return usage.current if usage is not None else 0

    def adopt_usage(self, usages: Iterable[tuple[Owner, Usage]]) -> None:
        """Past averages, from the ledger or from the books under the last policy. What is held now stays ours."""
        for owner, usage in usages:
            mine = self.usage.setdefault(owner, Usage())
            mine.average, mine.at = usage.average, usage.at

    def _charge(self, job: Job, attempt: Attempt, sign: int, now: float) -> None:
        for node_id in {placed.node_id for placed in attempt.placed}:
            on = self.charged_on.setdefault(node_id, set())
            if sign > 0:
                on.add(job.id)
            else:
                on.discard(job.id)
                if not on:
                    del self.charged_on[node_id]
        self.moves += 1
        self.gains += sign < 0
        units = sign * len(attempt.placed) * job.gang.bundle.gpu_units
        if job.queue in self._policy.queues:
            self.quota.add(job.queue, self.kind(attempt), units)
        key = job.queue, job.owner
        usage = self.usage.get(key)
        if usage is None:
            usage = self.usage[key] = Usage(at=now)
        usage.change(units, now, self._policy.half_life_s)

    def _note_run(self, job: Job, attempt: Attempt) -> None:
        if attempt.stop is not None or attempt.phase is Phase.RELEASING:
            self.ending[job.id] = None
            self.moves += 1
            self.gains += 1
            return
        end = self._planned_end(job, attempt)
        self._end_of[job.id] = end
        insort(self.ends, (end, job.seq, job.id))
        if job.time_limit_s is not None and attempt.started_at is not None and attempt.phase is Phase.RUNNING:
            insort(self.deadlines, (attempt.started_at + job.time_limit_s, job.id))
        self.runs.setdefault(job.queue, {})[job.id] = None
        if len(attempt.placed) > job.gang.minimum:
            self.elastic[job.id] = None
        if job.preemptible:
            counts = self.evictable.setdefault(job.queue, {})
            counts[job.priority] = counts.get(job.priority, 0) + 1

    def _forget_run(self, job: Job, attempt: Attempt) -> None:
        if attempt.stop is not None or attempt.phase is Phase.RELEASING:
            self.ending.pop(job.id, None)
            return
        entry = (self._end_of.pop(job.id), job.seq, job.id)
        del self.ends[bisect_left(self.ends, entry)]
        if job.time_limit_s is not None and attempt.started_at is not None and attempt.phase is Phase.RUNNING:
            del self.deadlines[bisect_left(self.deadlines, (attempt.started_at + job.time_limit_s, job.id))]
        self.elastic.pop(job.id, None)
        runs = self.runs[job.queue]
        del runs[job.id]
        if not runs:
            del self.runs[job.queue]
        if job.preemptible:
            counts = self.evictable[job.queue]
            counts[job.priority] -= 1
            if not counts[job.priority]:
                del counts[job.priority]
                if not counts:
                    del self.evictable[job.queue]

    def _planned_end(self, job: Job, attempt: Attempt) -> float:
        since = attempt.started_at if attempt.started_at is not None else attempt.admitted_at + START_S
        if job.time_limit_s is not None:
            return since + job.time_limit_s + job.grace_s
        if self._policy.predicted_limits:
            prediction = self._predictor.predict(job)
            if prediction is not None:
                return since + prediction.p90_s
        return inf
