"""Why a job can't run yet: a value with evidence, never an exception.

`code` is one of the constants below, in the order in which they are tried (first match wins). Issue-by-issue
the scheduler learns to give more of them; every one that it gives is documented under docs/reasons/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HELD = "Held"
"""The job's next attempt waits for a delay to pass (a back-off after an infrastructure failure)."""
INFEASIBLE = "Infeasible"
"""No node of the cluster, present or launchable, could hold one bundle."""
NODE_BOOTING = "NodeBooting"
"""A pending placement group asks the autoscaler for nodes."""
FRAGMENTED = "Fragmented"
"""Enough GPUs are free, but not in the shape that the gang needs."""
PRIORITY = "Priority"
"""The job stands behind another one that comes first."""
WAITING_FOR_CAPACITY = "WaitingForCapacity"
"""Fewer GPUs are free than the gang needs."""
NOT_EVALUATED = "NotEvaluated"
"""The scheduler has not looked at the job yet, or a bound was hit; the evidence says which."""


@dataclass(frozen=True, slots=True)
class Reason:
    """`message` is one sentence for a person, `evidence` the numbers and ids behind it, `advice` what to change."""

    code: str
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)
    advice: str = ""
