"""What happened. The only way to change `ClusterState`, and what the ledger keeps.

Each event is a fact with the time `at` (seconds since the epoch). Events about an attempt carry its number,
so that news of an old attempt can be told from news of the live one. `durable` events are written to the
ledger before any effect of theirs leaves the process; the others are observations that a restart makes anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rm.core.model import Gang, Job, NodeShape, Outcome, PlacedBundle, StopCause, Stray
from rm.core.policy import Policy
from rm.core.reasons import Reason


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    durable: ClassVar[bool] = True
    at: float
    job: Job

    @property
    def job_id(self) -> str:
        return self.job.id


@dataclass(frozen=True, slots=True)
class AvailabilityChecked:
    """The scheduler looked at a queued job. `reason` is None where it fits. Recorded when the answer changes."""

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    reason: Reason | None


@dataclass(frozen=True, slots=True)
class JobAdmitted:
    """A plan gave the job these places. Quota and GPUs are charged from here on."""

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    attempt: int
    placed: tuple[PlacedBundle, ...]
    gpu_type: str | None = None


@dataclass(frozen=True, slots=True)
class PlacementReady:
    """Ray holds the placement group. Ends the Reserve effect.

    `stand`: the attempt that it was made for, where that is another; its runners are in it already.
    """

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    attempt: int
    stand: str = ""


@dataclass(frozen=True, slots=True)
class ReserveFailed:
    """The group could not be had. Ends the Reserve effect. `node_id`: whose fault it was, where it was a node's."""

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    attempt: int
    why: str
    node_id: str | None = None


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The first line of user code is about to run on every rank. `hosts`: bundle → address."""

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    attempt: int
    hosts: tuple[str, ...] = ()
    gpu_ids: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class RunExited:
    """Every process of the attempt is gone. Ends the Run effect."""

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    attempt: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class RunLost:
    """A runner or its node died, or could not be started. Ends the Run effect. `node_id`: where, if that is known."""

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    attempt: int
    why: str
    node_id: str | None = None


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody or something wants the job to end: a user, its time limit, the loss of its holder."""

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    cause: StopCause
    by: str = ""


@dataclass(frozen=True, slots=True)
class HoldChanged:
    """Somebody holds a queued job back, or lets it go."""

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    held: bool
    by: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointReported:
    """The attempt has saved its work: from here on an eviction loses less."""

    durable: ClassVar[bool] = False
    at: float
    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """An administrator applied a configuration."""

    durable: ClassVar[bool] = True
    at: float
    policy: Policy
    by: str = ""
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class PlacementReleased:
    """The attempt's GPUs are seen free again. Ends the Release effect."""

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class NodeJoined:
    durable: ClassVar[bool] = True
    at: float
    node_id: str
    name: str
    gpu_slots: int
    cpu_milli: int
    memory_bytes: int
    labels: tuple[tuple[str, str], ...] = ()
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class NodeLost:
    durable: ClassVar[bool] = True
    at: float
    node_id: str
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class NodeCordoned:
    """Nothing new is placed on the node from now on. The last one counts; `draining`, `deadline`: see `Cordon`."""

    durable: ClassVar[bool] = True
    at: float
    node_id: str
    by: str = ""
    reason: str = ""
    draining: bool = False
    deadline: float | None = None
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class NodeUncordoned:
    """The node takes jobs again, and what was counted against it is forgotten."""

    durable: ClassVar[bool] = True
    at: float
    node_id: str
    by: str = ""
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class CordonInherited:
    """The cordoned node `old_id` is gone, and the only one of its name is this one: the cordon goes on with it."""

    durable: ClassVar[bool] = True
    at: float
    node_id: str
    old_id: str
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class GpuErrorsSeen:
    """A GPU of the node is broken: `why` is what its driver says. It may be cordoned for that."""

    durable: ClassVar[bool] = True
    at: float
    node_id: str
    why: str
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class GpusQuarantined:
    """So much of the node is given to nobody while these processes are there. The last one counts; 0 lifts it."""

    durable: ClassVar[bool] = True
    at: float
    node_id: str
    units: int
    strays: tuple[Stray, ...] = ()
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class ForeignUseObserved:
    """What work that is not ours holds on a node."""

    durable: ClassVar[bool] = False
    at: float
    node_id: str
    gpu_units: int
    cpu_milli: int
    memory_bytes: int
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class NodeTypesObserved:
    """The node types that the autoscaler may launch, each with its `most`. Empty where no autoscaler runs.

    `most_in_all`: of all types together; None where only the types have bounds. `awaited`: an autoscaler runs, or may
    run, whose node types could not be read yet: what no node could hold may still be possible.
    """

    durable: ClassVar[bool] = False
    at: float
    shapes: tuple[NodeShape, ...]
    most_in_all: int | None = None
    awaited: bool = False
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class GangCut:
    """A job that was submitted before the node types were known gets the bundles that it would have got since."""

    durable: ClassVar[bool] = True
    at: float
    job_id: str
    gang: Gang


@dataclass(frozen=True, slots=True)
class LaunchesObserved:
    """How many nodes of each type are up, and how many are on their way: asked for, launched, booting.

    `short`: types of which nodes are up with fewer GPUs than the type declares: how many, and the fewest GPUs of one.
    `returnable`: the nodes that the autoscaler takes away again when they are idle, by id.
    """

    durable: ClassVar[bool] = False
    at: float
    up: tuple[tuple[str, int], ...]
    booting: tuple[tuple[str, int], ...]
    short: tuple[tuple[str, int, int], ...] = ()
    returnable: tuple[str, ...] = ()
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class LaunchFailed:
    """A node of the type could not be had: `message` is the provider's, or says that it took too long."""

    durable: ClassVar[bool] = True
    at: float
    node_type: str
    message: str
    job_id: ClassVar[None] = None


Event = (
    JobSubmitted
    | AvailabilityChecked
    | JobAdmitted
    | PlacementReady
    | ReserveFailed
    | RunStarted
    | RunExited
    | RunLost
    | StopRequested
    | HoldChanged
    | CheckpointReported
    | PolicyChanged
    | PlacementReleased
    | NodeJoined
    | NodeLost
    | NodeCordoned
    | NodeUncordoned
    | CordonInherited
    | GpuErrorsSeen
    | GpusQuarantined
    | ForeignUseObserved
    | NodeTypesObserved
    | GangCut
    | LaunchesObserved
    | LaunchFailed
)
