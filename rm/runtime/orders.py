"""What the allocator tells a runner, and what the runner answers: plain values that travel between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rm.core.model import Kind


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a runner found itself. `port` is free there for a gang's rendezvous."""

    node_id: str
    node_name: str
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
    env: dict[str, str]
    python: str
    cpus: float
    checkpoint_dir: str
    grace_s: float

    @property
    def key(self) -> str:
        """Unique on the machine: marks every process of this bundle, and names its scratch directory."""
        return f"{self.ledger_key}-{self.job_id}.{self.attempt}-{self.bundle}"


@dataclass(frozen=True, slots=True)
class RunResult:
    """How one bundle's processes ended. `rank` and what follows describe the first that failed by itself."""

    ok: bool
    rank: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    message: str = ""
    tail: tuple[str, ...] = ()
    lost: bool = False
    """The node failed, not user code: the attempt may be tried again at the cluster's cost."""
    stopped: bool = False
    """The processes were told to stop and had not failed before."""
    progress: dict[str, Any] | None = None
    failed_at: float = field(default=0.0)
