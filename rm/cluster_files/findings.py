"""What a rule has found, and where."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """An error: it won't work, or is open to the world. A warning: it works, and probably isn't what is meant."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """`field`: dotted, "" for the whole file. `line`: of the field, or of the nearest thing around it."""

    severity: Severity
    rule: str
    field: str
    line: int | None
    message: str
    advice: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
