"""What the allocator tells a runner, and what the runner answers: plain values that travel between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rm.core.gpu_errors import Xid
from rm.core.model import Kind, attempt_key


def archive_id(ledger_key: str, job_id: str) -> str:
    """`k3f2a1c-j17`: a job's logs and results in the store. Job numbers start anew with each ledger."""
    return f"k{ledger_key}-{job_id}"


def process_mark(ledger_key: str, attempt: str, bundle: int) -> str:
    """`3f2a1c-j17.1-0`: the mark in the environment of every process of this bundle."""
    return f"{ledger_key}-{attempt}-{bundle}"


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a runner found itself. `port` is free there for a gang's rendezvous."""

    node_id: str
    address: str
    port: int
    gpu_ids: tuple[str, ...]
    python: str


@dataclass(frozen=True, slots=True)
class RunOrder:
    """One bundle's share of an attempt: `local_world` ranks, the first of them `first_rank` of `world`."""

    job_id: str
    attempt: int
    ledger_key: str
    node_name: str
    bundle: int
    bundles: int
    first_rank: int
    local_world: int
    world: int
    master_address: str
    master_port: int
    kind: Kind
    command: tuple[str, ...]
    payload_sha256: str
    working_dir_sha256: str
    cwd: str
    env: dict[str, str] = field(repr=False)  # may hold secrets
    python: str
    cpus: float
    checkpoint_dir: str
    grace_s: float
    array_index: int | None = None
    array_size: int | None = None

    @property
    def archive_id(self) -> str:
        """The job's name in the store, which may serve several ledgers over the years."""
        return archive_id(self.ledger_key, self.job_id)

    @property
    def key(self) -> str:
        """Unique on the machine: marks every process of this bundle, and names its scratch directory."""
        return process_mark(self.ledger_key, attempt_key(self.job_id, self.attempt), self.bundle)


@dataclass(frozen=True, slots=True)
class RunResult:
    """How one bundle's processes ended. `rank` and what follows describe the first that failed by itself."""

    ok: bool
    began: bool = False
    """User code ran, or could not be started for its own fault."""
    rank: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    message: str = ""
    tail: tuple[str, ...] = ()
    lost: bool = False
    """The node failed, not user code: the attempt may be tried again at the cluster's cost."""
    stopped: bool = False
    """The processes were told to stop and had not failed before."""
    clean: bool = False
    """Nothing of it is left on the node: another attempt may follow in the same place."""
    port: int = 0
    """Where it is clean: free there now, for the next attempt's rendezvous."""
    progress: dict[str, Any] | None = None
    xids: tuple[Xid, ...] = ()
    """What the driver reported of the bundle's GPUs meanwhile."""
    failed_at: float = field(default=0.0)
