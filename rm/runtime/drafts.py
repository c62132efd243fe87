"""From a request to the record that is submitted: the queue's rules and defaults, the gang, what it waits for.

No Ray and no waiting here, except for `Dependencies`, which reads the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from pydantic import ValidationError

from rm.core.model import TERMINAL, Gang, Job, NodeShape, Status
from rm.core.policy import Policy, QueuePolicy
from rm.core.records import replace
from rm.errors import Infeasible, InvalidSpec, PayloadTooLarge, UnknownJob, UnknownQueue
from rm.ledger import Ledger
from rm.ledger.codec import decode_spec
from rm.runtime.writer import Writer
from rm.spec import JobSpec, as_invalid_spec

COMMIT_S = 0.02
"""How long a commit under way is given before the ledger is asked again."""
Make = Callable[[str, int], Job]


GANGS_KEPT = 1_000
MOST_STORED_BYTES = 256 * 1024
"""Of one request, as the ledger stores it. An operating system takes not much more as a command line."""
MOST_STORED_AT_ONCE_BYTES = 64 * 2**20
"""Of one submission; each job of an array has a copy."""


def requested(texts: Sequence[str]) -> list[JobSpec]:
    """The requests of one submission, from their texts, which the ledger will store as they are.

    Raises InvalidSpec, and PayloadTooLarge where that is too much.
    """
    specs, total = [], 0
    for text in texts:
        try:
            spec = decode_spec(text)
        except ValidationError as error:
            raise as_invalid_spec(error) from None
        if len(text) > MOST_STORED_BYTES:
            raise PayloadTooLarge(
                f"{_largest(spec)}: the request takes {len(text) / 1024:.0f} KiB, and at most "
                f"{MOST_STORED_BYTES // 1024} KiB are kept in the ledger; pass large data in a file of the "
                "working_dir, or as arguments of a function",
                field=_largest(spec),
            )
        total += len(text) * (spec.array or 1)
        specs.append(spec)
    if total > MOST_STORED_AT_ONCE_BYTES:
        raise PayloadTooLarge(
            f"entries: the requests take {total / 2**20:.0f} MiB in the ledger, and at most "
            f"{MOST_STORED_AT_ONCE_BYTES // 2**20} MiB go into one step; submit them in parts, or pass large data in "
            "a file of the working_dir",
            field="entries",
        )
    return specs


def _largest(spec: JobSpec) -> str:
    sizes = {
        "command": sum(map(len, spec.command)),
        "env": sum(len(key) + len(value) for key, value in spec.env.items()),
        "runtime_env": len(str(spec.runtime_env)),
        "after": sum(map(len, spec.after)),
    }
    return max(sizes, key=lambda name: sizes[name])


class Drafting:
    """Makes drafts under one policy, for nodes of these shapes.

    `awaited`: node types may become known that are not among the shapes. What could not be held by these is accepted
    then, and how many bundles a number of GPUs is stays open.
    """

    def __init__(self, policy: Policy, shapes: Sequence[NodeShape], *, awaited: bool = False) -> None:
        self._policy = policy
        self._shapes = shapes
        self._awaited = awaited
        self._gangs: dict[str, Gang] = {}
        """Thousands of jobs mostly ask for the same."""

    def serves(self, policy: Policy, shapes: Sequence[NodeShape], *, awaited: bool) -> bool:
        """Whether another one, made of these, would make the same."""
        return policy is self._policy and shapes == self._shapes and awaited == self._awaited

    def draft(self, spec: JobSpec, after: tuple[str, ...], now: float) -> Make:
        """What makes the job from its id and number. Raises UnknownQueue, InvalidSpec, Infeasible.

        `after`: the jobs that it still has to wait for.
        """
        queue = queue_of(spec, self._policy)
        asked = spec.resources.model_dump_json()
        gang = self._gangs.get(asked)
        if gang is None:
            if len(self._gangs) >= GANGS_KEPT:
                self._gangs.clear()
            gang = self._gangs[asked] = self._gang(spec)
        priority = queue.default_priority if spec.priority is None else spec.priority
        limit_s = time_limit(spec, queue)
        uncut = self._awaited and spec.resources.to_be_cut

        def make(job_id: str, seq: int) -> Job:
            job = spec.job(job_id, seq, gang, now)
            return replace(
                job, queue=queue.name, priority=priority, time_limit_s=limit_s, after=after, uncut=uncut
            )

        return make

    def _gang(self, spec: JobSpec) -> Gang:
        try:
            return spec.resources.gang(self._shapes)
        except (Infeasible, InvalidSpec):
            if not self._awaited:
                raise
            return spec.resources.gang_as_asked()


def queue_of(spec: JobSpec, policy: Policy) -> QueuePolicy:
    """The rules of the queue that the request names, or of the default one. Raises UnknownQueue."""
    name, leaves = spec.queue or policy.default_queue, policy.leaves()
    if name in leaves:
        return policy.queues[name]
    known = f"known queues: {', '.join(leaves)}"
    if name in policy.queues:
        below = [each for each in leaves if _under(each, name, policy)]
        wrong = f"{name!r} is a group of queues; submit to one of them: {', '.join(below)}"
    elif not spec.queue:
        wrong = f"the cluster has no default queue; name one; {known}"
    else:
        wrong = f"there is no queue {name!r}; {known}"
    raise UnknownQueue(f"queue: {wrong}", field="queue")


def time_limit(spec: JobSpec, queue: QueuePolicy) -> float | None:
    """The job's own limit, else the queue's default, never more than the queue allows. Raises InvalidSpec."""
    most = queue.max_time_limit_s
    if spec.time_limit_s is None:
        return queue.default_time_limit_s if queue.default_time_limit_s is not None else most
    if most is not None and spec.time_limit_s > most:
        raise InvalidSpec(
            f"time_limit: {spec.time_limit_s:g} s is more than the {most:g} s that queue {queue.name} allows",
            field="time_limit",
        )
    return spec.time_limit_s


class Dependencies:
    """What the jobs of one submission wait for, by name of a job or of an array."""

    def __init__(self, writer: Writer, ledger: Ledger) -> None:
        self._writer = writer
        self._ledger = ledger
        self._succeeded: set[str] = set()
        self._arrays: dict[str, int] = {}
        """Array → how many of its jobs the ledger counted as live, none having failed."""

    async def settle(self, names: Iterable[str]) -> None:
        """Find out about each. Raises UnknownJob, and InvalidSpec for one that has ended otherwise than well.

        All that is known is still so when this returns; only the next wait may change it.
        """
        names = list(dict.fromkeys(names))
        while unknown := [name for name in names if not self._known(name)]:
            for name in unknown:
                await self._ask(name)

    def left(self, names: Iterable[str]) -> tuple[str, ...]:
        """The jobs that have yet to succeed. For names that were settled."""
        left: dict[str, None] = {}
        for name in names:
            if name in self._writer.state.jobs:
                left[name] = None
            elif name in self._arrays:
                left |= dict.fromkeys(self._live_members(name))
        return tuple(left)

    def _known(self, name: str) -> bool:
        if name in self._succeeded or name in self._writer.state.jobs:
            return True
        return name in self._arrays and self._arrays[name] == len(self._live_members(name))

    async def _ask(self, name: str) -> None:
        row = await asyncio.to_thread(self._ledger.job, name)
        if row is not None:
            if row.job.status is Status.SUCCEEDED:
                self._succeeded.add(name)
            elif row.job.status in TERMINAL:
                raise _never(name, f"ended {row.job.status}")
            else:
                await asyncio.sleep(COMMIT_S)
            return
        tally = await asyncio.to_thread(self._ledger.tally, name)
        if not tally:
            raise UnknownJob(
                f"after: no job {name!r} in this ledger; `rmctl ls --all` lists them", field="after"
            )
        bad = sum(count for status, count in tally.items() if status in TERMINAL - {Status.SUCCEEDED})
        if bad:
            raise _never(name, f"is an array of which {bad} jobs have ended without success")
        known = self._arrays.get(name)
        self._arrays[name] = sum(count for status, count in tally.items() if status not in TERMINAL)
        if known == self._arrays[name]:
            await asyncio.sleep(COMMIT_S)

    def _live_members(self, array_id: str) -> list[str]:
        return [job.id for job in self._writer.state.jobs.values() if job.array == array_id]


def _never(name: str, why: str) -> InvalidSpec:
    return InvalidSpec(f"after: {name} {why}, so what waits for it could never start", field="after")


def _under(name: str, above: str, policy: Policy) -> bool:
    parent = policy.queues[name].parent
    while parent is not None:
        if parent == above:
            return True
        parent = policy.queues[parent].parent
    return False
