"""What readers see: plain, immutable, JSON-able. SDK, command line and reports all show these and nothing else.

Amounts of GPUs are counts (1.0 = one device), times are seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from rm.core.launches import Coming
from rm.core.model import Cordon, Job, Node, Status, Stray
from rm.core.policy import ANY, Policy, QueuePolicy
from rm.core.quota import QuotaTree
from rm.core.reasons import Reason
from rm.core.resources import GPU_UNIT, gpu_count
from rm.lending import lent


@dataclass(frozen=True, slots=True)
class JobView:
    """One job. `reason` is set while it waits, `outcome` once it ended (or its last attempt did)."""

    id: str
    name: str
    owner: str
    kind: str
    queue: str
    priority: int
    status: str
    gpus: float
    bundles: int
    gpus_per_bundle: float
    ranks: int
    """Processes in all."""
    gpu_types: tuple[str, ...]
    attempts: int
    failures: int
    infra_failures: int
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    time_limit_s: float | None
    nodes: tuple[str, ...] = ()
    """Names of the nodes that the live attempt holds."""
    reason: dict[str, Any] | None = None
    """code, message, evidence, advice."""
    outcome: dict[str, Any] | None = None
    """status, message, rank, node_id, exit_code, signal, tail, infra."""
    progress: dict[str, Any] | None = None
    """What rank 0 last gave to `rm.report()`: {"at": …, "metrics": {…}}."""
    command: str = ""
    held: bool = False
    held_by: str = ""
    after: tuple[str, ...] = ()
    """Jobs that must still succeed before it may start."""
    evictions: int = 0
    preemptible: bool = True
    min_runtime_s: float = 0.0
    checkpoint_at: float | None = None
    """When the live attempt last said that it had saved its work."""
    least_bundles: int = 0
    """An elastic gang starts with so many; `bundles` is the most."""
    held_gpus: float = 0.0
    """What the live attempt holds now."""
    array: str = ""
    """The array that it is one of, with its place there in `array_index`."""
    array_index: int | None = None
    array_counts: dict[str, int] | None = None
    """For an array as a whole: how many of its jobs have which status."""
    stand: str = ""
    """The attempt that the live attempt's placement group and runners are named after: mostly itself."""
    as_of: float | None = None
    """When this was read, by the clock that its other times are of."""

    @property
    def ended(self) -> bool:
        return self.ended_at is not None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node: `free_gpus` is what a new job could get, `foreign_gpus` what work outside rm holds.

    `quarantined_gpus` are given to nobody, because `strays` hold memory there: `gpu`, `pid`, `name`, `user` (""
    where it can't be told), `memory_bytes`. The audit gives them back when the strays are gone.

    `warm_gpus` of the free ones are in placement groups of jobs that have just ended, which are kept a moment for the
    next; `warm` has the names of those groups, with their GPUs here. Other work on the cluster does not get them yet.

    `status`: "ready", "cordoned", "draining", "drained", "gone" or "booting". Where it isn't ready nothing is free, and
    `cordon` says why: `by`, `reason`, `at` (since when), `deadline` (of a drain, or None). A node that is "gone" is not
    in the cluster: what is left of it is its cordon, with `gone_at` (None: not known). One that is "booting" is not
    there yet: it has no id, its name is its node type, `jobs` are those that wait for it, and `booting_since` is when
    it was asked for, or first seen to boot.
    """

    id: str
    name: str
    gpu_type: str | None
    gpus: int
    charged_gpus: float
    foreign_gpus: float
    free_gpus: float
    cpus: float
    memory_bytes: int
    jobs: tuple[str, ...]
    labels: dict[str, str] = field(default_factory=dict)
    status: str = "ready"
    cordon: dict[str, Any] | None = None
    warm_gpus: float = 0.0
    warm: dict[str, float] = field(default_factory=dict)
    quarantined_gpus: float = 0.0
    strays: tuple[dict[str, Any], ...] = ()
    idle_since: float | None = None
    """Since when nobody has held a GPU here, as far as this allocator saw it; None where somebody does."""
    booting_since: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class EventView:
    """One row of the ledger's history, with the cluster's GPUs before and after it."""

    seq: int
    at: float
    kind: str
    job_id: str | None
    attempt: int | None
    body: dict[str, Any]
    free_before: float
    free_after: float
    charged_before: float
    charged_after: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class QueueView:
    """One queue. Amounts are GPUs by kind: a GPU type that quotas name, or "*" for all others; zeros are left out.

    A queue with others below it counts these in: `nominal` and `used` are sums, `borrowed` is what comes from outside
    all of them, `lent` what has gone there.
    """

    name: str
    parent: str | None
    nominal: dict[str, float]
    used: dict[str, float]
    borrowed: dict[str, float]
    lent: dict[str, float]
    share: float
    """Weighted share: the queue with the lowest comes first. 0 while it borrows nothing."""
    weight: float
    running: int
    """Jobs that hold GPUs, those that start or stop included."""
    pending: int
    stopped: bool
    preempt: str
    reclaim: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FindingView:
    """One difference that an audit found at `at`, and what was done. `kind`: see docs/reliability.md."""

    at: float
    kind: str
    what: str
    message: str
    evidence: dict[str, Any]
    repair: str
    repaired: bool
    """Whether it was seen to be gone afterwards. False for what is only reported."""


@dataclass(frozen=True, slots=True)
class AuditView:
    """One audit: `checked` counts what was compared, `not_checked` says what could not be and why.

    `recent`: the last findings of all audits since the allocator started, oldest first, these included.
    """

    at: float
    took_s: float
    checked: dict[str, int]
    not_checked: tuple[str, ...] = ()
    findings: tuple[FindingView, ...] = ()
    recent: tuple[FindingView, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing is left to do."""
        return all(each.repaired for each in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def reason_dict(reason: Reason | None) -> dict[str, Any] | None:
    return asdict(reason) if reason else None


def job_view(
    job: Job,
    *,
    command: str = "",
    progress: dict[str, Any] | None = None,
    node_names: dict[str, str] | None = None,
    ranks: int = 1,
    reason: Reason | None = None,
    as_of: float | None = None,
    stand: str = "",
) -> JobView:
    """The view of a core record. `reason` overrides the recorded one (readers compute it fresh)."""
    names = node_names or {}
    placed = job.attempt.placed if job.attempt else ()
    return JobView(
        id=job.id,
        name=job.name,
        owner=job.owner,
        kind=str(job.kind),
        queue=job.queue,
        priority=job.priority,
        status=str(job.status),
        gpus=gpu_count(job.gang.gpu_units),
        bundles=job.gang.count,
        gpus_per_bundle=gpu_count(job.gang.bundle.gpu_units),
        ranks=ranks,
        gpu_types=job.gang.gpu_types,
        attempts=job.attempts,
        failures=job.failures,
        infra_failures=job.infra_failures,
        submitted_at=job.submitted_at,
        started_at=job.first_started_at,
        ended_at=job.ended_at,
        time_limit_s=job.time_limit_s,
        nodes=tuple(dict.fromkeys(names.get(each.node_id, each.node_id[:8]) for each in placed)),
        reason=reason_dict(reason or job.reason),
        outcome=asdict(job.outcome) if job.outcome else None,
        progress=progress,
        command=command,
        held=job.held,
        held_by=job.held_by,
        after=job.after,
        evictions=job.evictions,
        preemptible=job.preemptible,
        min_runtime_s=job.min_runtime_s,
        checkpoint_at=job.attempt.checkpoint_at if job.attempt else None,
        least_bundles=job.gang.minimum,
        held_gpus=gpu_count(job.held_units),
        stand=stand,
        array=job.array,
        array_index=job.array_index,
        as_of=as_of,
    )


def array_view(array_id: str, first: JobView, tally: Mapping[Status, int], ended_at: float | None) -> JobView:
    """A whole array as one job: `first` of its jobs with the status of all. `ended_at`: of the last, if all ended."""
    return replace(
        first,
        id=array_id,
        status=str(array_status(tally)),
        attempts=0,
        failures=0,
        infra_failures=0,
        evictions=0,
        started_at=None,
        ended_at=ended_at,
        nodes=(),
        reason=None,
        outcome=None,
        progress=None,
        checkpoint_at=None,
        held_gpus=0.0,
        held=False,
        held_by="",
        array=array_id,
        array_index=None,
        array_counts={str(status): tally[status] for status in Status if tally.get(status)},
    )


_WORST_FIRST = (
    Status.RUNNING, Status.RESERVING, Status.STOPPING, Status.QUEUED, Status.FAILED, Status.TIMED_OUT,
    Status.CANCELLED,
)  # fmt: skip


def array_status(tally: Mapping[Status, int]) -> Status:
    """RUNNING while any of them does; ended only when all have; SUCCEEDED only if all did."""
    return next((status for status in _WORST_FIRST if tally.get(status)), Status.SUCCEEDED)


NOTHING_IDLE: Mapping[str, int] = MappingProxyType({})


def node_view(
    node: Node,
    jobs: tuple[str, ...],
    cordon: Cordon | None = None,
    idle: Mapping[str, int] = NOTHING_IDLE,
    idle_since: float | None = None,
    strays: tuple[Stray, ...] = (),
) -> NodeView:
    """`jobs`: what is charged there, whether it starts, runs or ends. `idle`: groups without an attempt, in units."""
    charged = node.gpu_slots * GPU_UNIT - node.devices.total_free
    left = node.devices.without_foreign(node.foreign_units).total_free
    foreign = node.gpu_slots * GPU_UNIT - charged - left
    quarantined = min(foreign, node.quarantined_units)
    # What a new gang was given may still be in the group of the last one.
    warm = min(sum(idle.values()), left)
    return NodeView(
        id=node.id,
        name=node.name,
        gpu_type=node.gpu_type,
        gpus=node.gpu_slots,
        charged_gpus=gpu_count(charged),
        foreign_gpus=gpu_count(foreign - quarantined),
        free_gpus=0.0 if cordon else gpu_count(left),
        cpus=node.cpu_milli / 1000,
        memory_bytes=node.memory_bytes,
        jobs=jobs,
        labels=dict(node.labels),
        status="ready" if cordon is None else _cordoned(cordon, jobs),
        cordon=None if cordon is None else _why_cordoned(cordon),
        warm_gpus=gpu_count(warm),
        warm={name: gpu_count(units) for name, units in idle.items()},
        quarantined_gpus=gpu_count(quarantined),
        strays=tuple(asdict(each) for each in strays),
        idle_since=idle_since if node.gpu_slots else None,
    )


def gone_node_view(cordon: Cordon) -> NodeView:
    """A cordoned node that is not there."""
    return NodeView(
        id=cordon.node_id,
        name=cordon.name or cordon.node_id[:8],
        gpu_type=None,
        gpus=0,
        charged_gpus=0.0,
        foreign_gpus=0.0,
        free_gpus=0.0,
        cpus=0.0,
        memory_bytes=0,
        jobs=(),
        status="gone",
        cordon={**_why_cordoned(cordon), "gone_at": cordon.gone_at},
    )


def booting_node_view(coming: Coming) -> NodeView:
    """A node that is on its way."""
    shape = coming.shape
    return NodeView(
        id="",
        name=shape.name,
        gpu_type=shape.gpu_type,
        gpus=shape.gpu_slots,
        charged_gpus=0.0,
        foreign_gpus=0.0,
        free_gpus=0.0,
        cpus=shape.cpu_milli / 1000,
        memory_bytes=shape.memory_bytes,
        jobs=coming.jobs,
        labels=dict(shape.labels),
        status="booting",
        booting_since=coming.since,
    )


def _why_cordoned(cordon: Cordon) -> dict[str, Any]:
    return {"by": cordon.by, "reason": cordon.reason, "at": cordon.at, "deadline": cordon.deadline}


def _cordoned(cordon: Cordon, jobs: tuple[str, ...]) -> str:
    if not cordon.draining:
        return "cordoned"
    return "draining" if jobs else "drained"


def queue_views(
    policy: Policy, quota: QuotaTree, jobs: Iterable[Job], capacity: Mapping[str, int] | None = None
) -> list[QueueView]:
    """Every queue, each above those below it; at the end queues that are no longer configured and still have jobs.

    `quota`: what the live jobs are charged. `capacity`: units by GPU type that the cluster has, as
    `Capacity.by_type` tells: what no queue owns of it is lent first.
    """
    counts: dict[str, tuple[int, int]] = {}
    gone: dict[str, dict[str, int]] = {}
    for job in jobs:
        running, pending = counts.get(job.queue, (0, 0))
        counts[job.queue] = (running + (job.attempt is not None), pending + (job.attempt is None))
        if job.queue not in policy.queues:
            held = gone.setdefault(job.queue, {})
            if job.attempt is not None:
                kind = quota.kind(job.attempt.gpu_type)
                held[kind] = held.get(kind, 0) + job.held_units
    kinds = (ANY, *sorted(policy.kinds()))
    lent_now = lent(policy, quota, capacity)
    below: dict[str | None, list[QueuePolicy]] = {}
    for queue in policy.queues.values():
        below.setdefault(queue.parent, []).append(queue)

    def view(queue: QueuePolicy) -> Iterator[QueueView]:
        under = [list(view(each)) for each in below.get(queue.name, [])]
        parts = [views[0] for views in under]
        running, pending = counts.get(queue.name, (0, 0))
        used = {kind: quota.usage(queue.name, kind) for kind in kinds}
        yield QueueView(
            name=queue.name,
            parent=queue.parent,
            nominal=_sum(_counts(queue.nominal or {}), *(each.nominal for each in parts)),
            used=_sum(*(each.used for each in parts)) if parts else _counts(used),
            borrowed=_counts({kind: quota.borrowed(queue.name, kind) for kind in kinds})
            if quota.limited
            else {},
            lent=_counts({kind: lent_now.get((queue.name, kind), 0) for kind in kinds}),
            share=quota.share(queue.name),
            weight=queue.weight,
            running=running + sum(each.running for each in parts),
            pending=pending + sum(each.pending for each in parts),
            stopped=queue.stopped,
            preempt=str(queue.preempt),
            reclaim=str(queue.reclaim),
        )
        for views in under:
            yield from views

    found = [each for queue in below.get(None, []) for each in view(queue)]
    for name in sorted(gone):
        running, pending = counts[name]
        rules = QueuePolicy(name, stopped=True)
        used_now = _counts(gone[name])
        found.append(
            QueueView(
                name,
                None,
                {},
                used_now,
                {},
                {},
                0.0,
                1.0,
                running,
                pending,
                True,
                str(rules.preempt),
                str(rules.reclaim),
            )
        )
    return found


def _counts(units: Mapping[str, int]) -> dict[str, float]:
    return {kind: gpu_count(amount) for kind, amount in units.items() if amount}


def _sum(*amounts: Mapping[str, float]) -> dict[str, float]:
    kinds = dict.fromkeys(kind for each in amounts for kind in each)
    return {kind: round(sum(each.get(kind, 0) for each in amounts), 4) for kind in kinds}
