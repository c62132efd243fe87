"""What is to be done in the world. The state returns them, the runtime carries them out after the commit.

Every effect is idempotent by (job id, attempt number): carrying it out twice is the same as once. Reserve, Run
and Release each end in exactly one event; Stop hastens the end of the Reserve or Run under way and has none of
its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from rm.core.model import Gang, Kind, PlacedBundle


@dataclass(frozen=True, slots=True)
class Reserve:
    """Make the placement group. Ends in PlacementReady or ReserveFailed."""

    job_id: str
    attempt: int
    gang: Gang
    placed: tuple[PlacedBundle, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Start runners and user code. Ends in RunExited or RunLost, with RunStarted on the way.

    For a lease nothing is started: RunStarted follows at once, and RunExited after Stop. `begun`: another allocator has
    started it already, so that runners which are not there have died.
    """

    job_id: str
    attempt: int
    kind: Kind
    gang: Gang
    placed: tuple[PlacedBundle, ...]
    grace_s: float
    array_index: int | None = None
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGTERM, `grace_s`, SIGKILL; or give up a reservation that is not there yet."""

    job_id: str
    attempt: int
    grace_s: float


@dataclass(frozen=True, slots=True)
class Release:
    """End the runners, remove the group, see the GPUs free. Ends in PlacementReleased, however long it takes."""

    job_id: str
    attempt: int
    gang: Gang
    placed: tuple[PlacedBundle, ...]


Effect = Reserve | Run | Stop | Release
