"""What another policy would do to the jobs that live now: asked before it is applied, and shown by `--dry-run`.

A pure function of records. Only changes are told: what is so under the old policy as well is nobody's news, so a
policy that equals the old one has no consequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from rm.core.capacity import matches
from rm.core.model import Gang, Job, NodeShape
from rm.core.placement import feasible
from rm.core.policy import ANY, Policy, Reclaim
from rm.core.quota import QuotaTree
from rm.core.resources import GPU_UNIT, gpu_count, gpus_in_words

MOST_NAMED = 5
"""Jobs that a sentence names; the record has all of them."""


@dataclass(frozen=True, slots=True)
class Consequence:
    """One thing that would happen, as a sentence, and to which jobs of which queue."""

    message: str
    queue: str = ""
    jobs: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return self.message


def consequences(
    jobs: Iterable[Job], shapes: Sequence[NodeShape], old: Policy, new: Policy
) -> list[Consequence]:
    """What replacing `old` by `new` would do to `jobs`. `shapes`: the nodes that the cluster has or could launch."""
    live = sorted(jobs, key=lambda job: job.seq)
    before, after = _World(old, shapes, live), _World(new, shapes, live)
    return [
        *_queues_gone(before, after),
        *_queues_stopped(before, after),
        *_never_again(before, after),
        *_over_quota(before, after),
        *_owners_over(before, after),
        *_more_than_there_is(before, after),
    ]


class _World:
    """The jobs and the cluster under one policy."""

    def __init__(self, policy: Policy, shapes: Sequence[NodeShape], jobs: Sequence[Job]) -> None:
        self.policy = policy
        self.shapes = shapes
        self.waiting: dict[str, list[Job]] = {}
        self.running: dict[str, list[Job]] = {}
        self._leaves = frozenset(policy.leaves())
        self.capacity: dict[str, int] = {}
        for shape in shapes:
            name = shape.gpu_type or ""
            self.capacity[name] = self.capacity.get(name, 0) + shape.gpu_slots * shape.most * GPU_UNIT
        self.quota = QuotaTree(policy, self.capacity)
        self._known: dict[tuple[str, Gang], bool] = {}
        for job in jobs:
            (self.running if job.attempt else self.waiting).setdefault(job.queue, []).append(job)
            if job.attempt is not None and job.queue in policy.queues:
                self.quota.add(job.queue, self.quota.kind(job.attempt.gpu_type), job.held_units)

    def named(self) -> list[str]:
        """The queues that live jobs are in."""
        return sorted({*self.waiting, *self.running})

    @property
    def kinds(self) -> tuple[str, ...]:
        return (ANY, *sorted(self.quota.kinds))

    def takes(self, queue: str) -> bool:
        """Whether jobs may stand in the queue."""
        return queue in self._leaves

    def opens(self, queue: str) -> bool:
        return self.takes(queue) and not self.policy.queues[queue].stopped

    def could_ever(self, job: Job) -> bool:
        """Whether the job could start in its queue if nothing else ran. Queues that are gone are not asked."""
        key = job.queue, job.gang
        if key not in self._known:
            self._known[key] = not self.takes(job.queue) or self._could_hold(job.queue, job.gang)
        return self._known[key]

    def _could_hold(self, queue: str, gang: Gang) -> bool:
        rules = self.policy.queues[queue]
        units = gang.least_units
        if rules.max_gpus_per_owner is not None and units > rules.max_gpus_per_owner:
            return False
        wanted = replace(gang, labels=tuple(sorted({*gang.labels, *rules.labels})))
        fitting = [shape for shape in self.shapes if shape.gpu_slots and matches(wanted, shape.labels)]
        by_kind: dict[str, list[NodeShape]] = {}
        for shape in fitting:
            by_kind.setdefault(self.quota.kind(shape.gpu_type), []).append(shape)
        return any(
            self.quota.most(queue, kind) >= units and feasible(wanted, shapes)
            for kind, shapes in by_kind.items()
        )

    def over(self, queue: str, kind: str) -> int:
        """Units that the queue's jobs hold above what it owns; 0 for queues that are gone or own by no rule."""
        if not self.quota.limited or not self.takes(queue):
            return 0
        return self.quota.borrowed(queue, kind)

    def excess(self, queue: str, kind: str) -> int:
        """Units that it holds above all that it may take."""
        if not self.quota.limited or not self.takes(queue):
            return 0
        return max(0, -self.quota.available(queue, kind))

    def held(self, queue: str, kind: str) -> list[Job]:
        """The queue's jobs that hold GPUs of this kind."""
        running = self.running.get(queue, [])
        return [job for job in running if job.attempt and self.quota.kind(job.attempt.gpu_type) == kind]

    def owner_over(self, queue: str, units: int) -> bool:
        """Whether an owner with so many units in the queue is above its limit there."""
        limit = self.policy.queues[queue].max_gpus_per_owner if self.takes(queue) else None
        return limit is not None and units > limit


def _queues_gone(before: _World, after: _World) -> Iterator[Consequence]:
    for queue in after.named():
        if after.takes(queue) or not before.takes(queue):
            continue
        team = queue in after.policy.queues
        what = "will have queues below it and take no jobs itself" if team else "will be gone"
        waiting, running = after.waiting.get(queue, []), after.running.get(queue, [])
        if waiting:
            yield _told(
                queue,
                waiting,
                f"queue {queue} {what}: {_count(waiting)} {_verb(waiting, 'wait')} until it is back",
            )
        if running:
            charged = "" if team else ", charged to no quota"
            yield _told(
                queue, running, f"queue {queue} {what}: {_count(running)} {_verb(running, 'go')} on{charged}"
            )


def _queues_stopped(before: _World, after: _World) -> Iterator[Consequence]:
    for queue in after.named():
        waiting = after.waiting.get(queue, [])
        if waiting and after.takes(queue) and before.opens(queue) and not after.opens(queue):
            yield _told(
                queue,
                waiting,
                f"queue {queue} will be stopped: {_count(waiting)} {_verb(waiting, 'wait')} until it is open",
            )


def _never_again(before: _World, after: _World) -> Iterator[Consequence]:
    for queue in after.named():
        stuck = [
            job
            for job in after.waiting.get(queue, [])
            if not after.could_ever(job) and before.could_ever(job)
        ]
        if stuck:
            yield _told(
                queue,
                stuck,
                f"queue {queue} could never hold {_count(stuck)} that {_verb(stuck, 'wait')} in it",
            )


def _over_quota(before: _World, after: _World) -> Iterator[Consequence]:
    reclaims = any(rules.reclaim is not Reclaim.NEVER for rules in after.policy.queues.values())
    for queue in after.named():
        for kind in after.kinds:
            over = after.over(queue, kind)
            if over > before.over(queue, kind):
                running = after.held(queue, kind)
                lose = [job for job in running if job.preemptible] if reclaims else []
                used = after.quota.usage(queue, kind)
                may = f", which may be taken back from {_names(lose)}" if lose else ""
                yield _told(
                    queue,
                    lose or running,
                    f"queue {queue} will own {_gpus(used - over, kind)} and holds {_gpus(used, kind)}: "
                    f"it borrows {gpu_count(over):g}{may}",
                )
            excess = after.excess(queue, kind)
            if excess > before.excess(queue, kind):
                yield _told(
                    queue,
                    after.held(queue, kind),
                    f"queue {queue} will be {_gpus(excess, kind)} above all that it may take: "
                    "nothing more of it starts on these until they are given back",
                )


def _owners_over(before: _World, after: _World) -> Iterator[Consequence]:
    holding: dict[tuple[str, str], list[Job]] = {}
    for running in after.running.values():
        for job in running:
            holding.setdefault((job.queue, job.owner), []).append(job)
    for (queue, owner), theirs in holding.items():
        units = sum(job.held_units for job in theirs)
        if after.owner_over(queue, units) and not before.owner_over(queue, units):
            limit = after.policy.queues[queue].max_gpus_per_owner or 0
            yield _told(
                queue,
                theirs,
                f"{owner} holds {_gpus(units)} in queue {queue}, where one owner may hold {gpu_count(limit):g}: "
                "they go on, and nothing more of that owner starts there until some are given back",
            )


def _more_than_there_is(before: _World, after: _World) -> Iterator[Consequence]:
    for kind in after.kinds:
        owned, there = _promised(after, kind)
        was_owned, was_there = _promised(before, kind)
        if owned > there > 0 and (kind not in before.kinds or was_owned <= was_there or owned > was_owned):
            yield Consequence(
                f"the queues will own {_gpus(owned, kind)} together, and the cluster has or could launch "
                f"{gpu_count(there):g}: not all of them can have theirs at once"
            )


def _promised(world: _World, kind: str) -> tuple[int, int]:
    """Units that queues own of the kind, and units that the cluster has or could launch."""
    owned = sum((rules.nominal or {}).get(kind, 0) for rules in world.policy.queues.values())
    there = sum(units for gpu_type, units in world.capacity.items() if world.quota.kind(gpu_type) == kind)
    return owned, there


# --- words -------------------------------------------------------------------------------------------------


def _told(queue: str, jobs: Sequence[Job], message: str) -> Consequence:
    return Consequence(message, queue, tuple(job.id for job in jobs))


def _names(jobs: Sequence[Job]) -> str:
    return ", ".join(job.id for job in jobs[:MOST_NAMED]) + (" …" if len(jobs) > MOST_NAMED else "")


def _count(jobs: Sequence[Job]) -> str:
    return f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'} ({_names(jobs)})"


def _verb(jobs: Sequence[Job], word: str) -> str:
    ending = "es" if word.endswith("o") else "s"
    return word + ending if len(jobs) == 1 else word


def _gpus(units: int, kind: str = ANY) -> str:
    return gpus_in_words(units, "" if kind == ANY else kind)
