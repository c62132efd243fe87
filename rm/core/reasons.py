"""Why a job can't run yet: a value with evidence, never an exception.

`code` is one of the constants below, in the order in which they are tried (first match wins). Issue-by-issue
the scheduler learns to give more of them; every one that it gives is documented under docs/reasons/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HELD = "Held"
"""Somebody holds the job back, or its next attempt waits for a pause to pass (after an infrastructure failure)."""
DEPENDENCY = "Dependency"
"""Jobs that must succeed first have not ended."""
QUEUE_STOPPED = "QueueStopped"
"""The queue is stopped, or is gone from the configuration."""
NODES_CORDONED = "NodesCordoned"
"""Only with nodes that are cordoned could the gang be held."""
NO_MATCHING_GPU_TYPE = "NoMatchingGpuType"
"""No node, present or launchable, has one of the GPU types or carries the labels."""
INFEASIBLE = "Infeasible"
"""No mix of the cluster's nodes, present or launchable, could hold the gang."""
EXCEEDS_QUOTA = "ExceedsQuota"
"""The queue could never hold the gang, even if nothing else ran."""
WAITING_FOR_QUOTA = "WaitingForQuota"
"""The queue's quota, or the owner's limit, is used up."""
WAITING_FOR_VICTIMS = "WaitingForVictims"
"""GPUs are being given back for this job: by jobs that were evicted for it, or that are ending."""
NODE_BOOTING = "NodeBooting"
"""A pending placement group asks the autoscaler for nodes."""
LAUNCH_FAILED = "LaunchFailed"
"""The autoscaler could not launch a node for it."""
RESERVED = "Reserved"
"""Free GPUs are kept for a job that comes first, and this one might still run when that one is due."""
FRAGMENTED = "Fragmented"
"""Enough GPUs are free, but not in the shape that the gang needs."""
PRIORITY = "Priority"
"""The job stands behind another one that comes first."""
WAITING_FOR_CAPACITY = "WaitingForCapacity"
"""Fewer GPUs are free than the gang needs."""
NOT_EVALUATED = "NotEvaluated"
"""The scheduler has not looked at the job yet. Where one of its bounds was hit before, the evidence says which."""


@dataclass(frozen=True, slots=True)
class Reason:
    """`message` is one sentence for a person, `evidence` the numbers and ids behind it, `advice` what to change."""

    code: str
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)
    advice: str = ""
