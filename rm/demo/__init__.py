"""`rmctl demo`: the main job end to end, for a person watching.

Request → check availability → allocate → run → release → the next request allocated, on a Ray of its own: two trainings
that each need all GPUs, so that the second must wait for the first. What is told at the end is read back from the
ledger, not remembered.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rm.demo.sandbox import private_directory, training, training_scripts
from rm.demo.stage import Stage
from rm.demo.steps import Step, steps, steps_table
from rm.errors import ClusterError, RmError

if TYPE_CHECKING:
    from rm.client import Client
    from rm.job import Job
    from rm.runtime.local import LocalRay

LOOK_S = 0.15
TIME_LIMIT_S = 300
NAMES = ("first", "second")
INTERRUPTED = 130


@dataclass
class Story:
    """What a demo found out. `accuracy`: what each job measured in the end, by name."""

    gpus: float = 0
    real_gpus: bool = False
    trained: str = ""
    steps: list[Step] = field(default_factory=list)
    statuses: dict[str, str] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    free_gpus: float = 0
    charged_gpus: float = 0
    took_s: float = 0.0

    @property
    def succeeded(self) -> bool:
        """Both trained, and every GPU is free again."""
        both = [self.statuses.get(name) for name in NAMES] == ["SUCCEEDED"] * len(NAMES)
        return both and self.free_gpus == self.gpus and self.charged_gpus == 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "succeeded": self.succeeded,
            "gpus": self.gpus,
            "real_gpus": self.real_gpus,
            "trained": self.trained,
            "jobs": self.statuses,
            "measured": self.measured,
            "free_gpus": self.free_gpus,
            "charged_gpus": self.charged_gpus,
            "took_s": self.took_s,
            "steps": [step.to_dict() for step in self.steps],
        }
