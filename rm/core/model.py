"""The nouns: node, gang, job, attempt, outcome. All immutable: a change makes a new record.

Readers therefore share these records with the state that made them and can never see half a change.
Times are seconds since the epoch as the allocator's clock gave them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from rm.core.reasons import Reason
from rm.core.resources import Bundle, Devices, gpu_count

GPU_TYPE = "ray.io/accelerator-type"
"""The label that names a node's type of GPU."""


class Status(StrEnum):
    """The state of a job as people see it. `docs/states.md` has a section for each."""

    QUEUED = "QUEUED"
    RESERVING = "RESERVING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.TIMED_OUT})


class Strategy(StrEnum):
    """How a gang's bundles spread over nodes; Ray's four words."""

    PACK = "PACK"
    STRICT_PACK = "STRICT_PACK"
    SPREAD = "SPREAD"
    STRICT_SPREAD = "STRICT_SPREAD"


class Kind(StrEnum):
    """What runs in the allocation. A lease runs nothing of ours."""

    COMMAND = "command"
    FUNCTION = "function"
    LEASE = "lease"


@dataclass(frozen=True, slots=True)
class Gang:
    """`count` equal bundles, all or nothing, on nodes that carry every label and are of one of the GPU types.

    `gpu_types` is in the order of preference; the whole gang gets one of them. `least`: an elastic gang takes what
    there is from `least` bundles on; 0 means all of them.
    """

    bundle: Bundle
    count: int = 1
    strategy: Strategy = Strategy.PACK
    gpu_types: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    least: int = 0

    def __hash__(self) -> int:
        # Asked for thousands of times in a cycle: what differs most between gangs is enough.
        return hash((self.bundle.gpu_units, self.bundle.cpu_milli, self.count, self.gpu_types))

    @property
    def gpu_units(self) -> int:
        return self.bundle.gpu_units * self.count

    @property
    def minimum(self) -> int:
        """The fewest bundles with which it runs."""
        return self.least or self.count

    @property
    def least_units(self) -> int:
        """GPU units with which it runs at least."""
        return self.minimum * self.bundle.gpu_units

    def sized(self, count: int) -> Gang:
        """The same with exactly `count` bundles."""
        if self.count == count and not self.least:
            return self
        return Gang(self.bundle, count, self.strategy, self.gpu_types, self.labels)

    def at_most(self, count: int) -> Gang:
        """The same with its minimum as it is and at most `count` bundles."""
        return replace(self, count=min(count, self.count), least=self.minimum)

    def on(self, labels: tuple[tuple[str, str], ...]) -> Gang:
        """The same, only on nodes that carry these labels too."""
        return replace(self, labels=tuple(sorted({*self.labels, *labels}))) if labels else self

    def __str__(self) -> str:
        shape = f"{gpu_count(self.bundle.gpu_units):g} GPU"
        kind = f" ({' or '.join(self.gpu_types)})" if self.gpu_types else ""
        if self.minimum < self.count:
            return f"{self.minimum} to {self.count} × {shape}{kind}"
        return f"{self.count} × {shape}{kind}" if self.count > 1 else f"{shape}{kind}"


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the Ray cluster. `devices`, `cpu_free_milli`, `memory_free_bytes` are after our own charges.

    `foreign_units`: GPUs that Ray counts as used and that no group of ours holds, and those in quarantine.
    """

    id: str
    name: str
    gpu_slots: int
    devices: Devices
    cpu_milli: int
    cpu_free_milli: int
    memory_bytes: int
    memory_free_bytes: int
    labels: tuple[tuple[str, str], ...] = ()
    foreign_units: int = 0
    foreign_cpu_milli: int = 0
    foreign_memory_bytes: int = 0
    cordoned: bool = False
    """Nothing new is placed here."""
    quarantined_units: int = 0
    """How many of `foreign_units` are kept from everybody because strays are on them."""
    returnable: bool = False
    """An autoscaler takes it away when it is idle."""

    @property
    def gpu_type(self) -> str | None:
        return dict(self.labels).get(GPU_TYPE)


@dataclass(frozen=True, slots=True)
class Stray:
    """A process that holds memory of a GPU which nobody gave it. `user`: "" where that can't be told."""

    gpu: int
    pid: int
    name: str
    user: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """So much of a node is given to nobody, since `at`, because of these processes there."""

    node_id: str
    at: float
    units: int
    strays: tuple[Stray, ...] = ()


@dataclass(frozen=True, slots=True)
class Cordon:
    """Why nothing new is placed on a node. `at`: since when. `draining`: what runs there has to go as well.

    `deadline`: when whatever still runs there is stopped; None: its end is waited for, however long that takes.
    """

    node_id: str
    at: float
    by: str = ""
    reason: str = ""
    draining: bool = False
    deadline: float | None = None
    name: str = ""
    """The node's, as last seen: a machine keeps it when Ray is started anew there, and gets another id."""
    gone_at: float | None = None
    """Since when the node is not there, where it is known to be gone."""


@dataclass(frozen=True, slots=True)
class NodeShape:
    """What one node of a type has when it is empty, and how many of them there can be at most."""

    gpu_slots: int
    cpu_milli: int
    memory_bytes: int
    labels: tuple[tuple[str, str], ...] = ()
    most: int = 1
    name: str = ""

    @property
    def gpu_type(self) -> str | None:
        return dict(self.labels).get(GPU_TYPE)


@dataclass(frozen=True, slots=True)
class PlacedBundle:
    """One bundle of an attempt: the node it is pinned to and the device slots it takes there."""

    node_id: str
    slots: tuple[int, ...]


def units_by_node(placed: Iterable[PlacedBundle], bundle_units: int) -> Counter[str]:
    """GPU units that bundles of so many take on each node."""
    units: Counter[str] = Counter()
    for each in placed:
        units[each.node_id] += bundle_units
    return units


class Phase(StrEnum):
    """Where an attempt stands. RESERVING: its group is being made. STARTING: runners and user code start."""

    RESERVING = "RESERVING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RELEASING = "RELEASING"


class StopCause(StrEnum):
    """Why an attempt was told to stop. The first cause wins."""

    CANCELLED = "cancelled"
    TIME_LIMIT = "time_limit"
    HOLDER_LOST = "holder_lost"
    RELEASED = "released"
    PREEMPTED = "preempted"
    RESIZED = "resized"
    DRAINED = "drained"

    @property
    def comes_back(self) -> bool:
        """Whether the job is queued again when the attempt has ended."""
        return self in (StopCause.PREEMPTED, StopCause.RESIZED, StopCause.DRAINED)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt or a job ended. `tail`: the last lines that the failing rank printed."""

    status: Status
    message: str = ""
    rank: int | None = None
    node_id: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    tail: tuple[str, ...] = ()
    infra: bool = False


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at running a job. `number` counts from 1; events of an older number are dropped."""

    number: int
    placed: tuple[PlacedBundle, ...]
    phase: Phase
    admitted_at: float
    started_at: float | None = None
    stop: StopCause | None = None
    stop_by: str = ""
    outcome: Outcome | None = None
    gpu_type: str | None = None
    """Of its nodes; None where they have none, or several."""
    checkpoint_at: float | None = None
    """When it last reported a checkpoint: what an eviction would lose counts from here."""
    stand: str = ""
    """The attempt whose placement group and runners it took over, "" where they are its own."""


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted request. `seq` is its place in the order of submission; `attempt` the live one, if any."""

    id: str
    seq: int
    name: str
    owner: str
    kind: Kind
    gang: Gang
    submitted_at: float
    queue: str = "default"
    priority: int = 0
    time_limit_s: float | None = None
    grace_s: float = 30.0
    max_retries: int = 0
    max_infra_retries: int = 3
    ttl_s: float | None = None
    """Attached jobs and leases: the longest silence of the holder. The runtime listens and reports."""
    preemptible: bool = True
    min_runtime_s: float = 0.0
    """Since its start, how long it is spared from eviction."""
    after: tuple[str, ...] = ()
    """Jobs that must still succeed before it may start."""
    held: bool = False
    held_by: str = ""
    uncut: bool = False
    """How many nodes its GPUs are to be on is not settled: it was submitted before the node types were known."""
    array: str = ""
    """The id under which the jobs of an array were submitted together; `array_index` is its place there."""
    array_index: int | None = None
    ran_s: float = 0.0
    """Seconds that earlier attempts ran and that their checkpoints kept."""
    evictions: int = 0
    status: Status = Status.QUEUED
    attempt: Attempt | None = None
    attempts: int = 0
    failures: int = 0
    infra_failures: int = 0
    eligible_at: float = 0.0
    queued_at: float = 0.0
    first_started_at: float | None = None
    ended_at: float | None = None
    outcome: Outcome | None = None
    reason: Reason | None = field(default=None)

    @property
    def held_units(self) -> int:
        """GPU units that the live attempt is charged."""
        return len(self.attempt.placed) * self.gang.bundle.gpu_units if self.attempt else 0


def attempt_key(job_id: str, number: int) -> str:
    """`j17.1`: the name of an attempt in Ray, in the ledger and in log paths."""
    return f"{job_id}.{number}"
