"""ray-rm: the GPU resource manager for teams on Ray.

`import rm` is light: nothing is loaded until it is used, so that a job which only calls `rm.report` pays for
neither Ray nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm.client import Client, connect, require_gpus
    from rm.context import (
        array_index,
        array_size,
        attempt,
        checkpoint_dir,
        checkpointed,
        in_job,
        job_id,
        local_rank,
        rank,
        report,
        should_stop,
        world_size,
    )
    from rm.errors import RmError
    from rm.job import Job
    from rm.lease import Lease

__version__ = "0.1.0"

_HOME = {
    "Client": "rm.client",
    "Job": "rm.job",
    "Lease": "rm.lease",
    "connect": "rm.client",
    "require_gpus": "rm.client",
    "RmError": "rm.errors",
    "array_index": "rm.context",
    "array_size": "rm.context",
    "attempt": "rm.context",
    "checkpoint_dir": "rm.context",
    "checkpointed": "rm.context",
    "in_job": "rm.context",
    "job_id": "rm.context",
    "local_rank": "rm.context",
    "rank": "rm.context",
    "report": "rm.context",
    "should_stop": "rm.context",
    "world_size": "rm.context",
}

__all__ = [
    "Client",
    "Job",
    "Lease",
    "RmError",
    "array_index",
    "array_size",
    "attempt",
    "checkpoint_dir",
    "checkpointed",
    "connect",
    "in_job",
    "job_id",
    "local_rank",
    "rank",
    "report",
    "require_gpus",
    "should_stop",
    "world_size",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'rm' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
