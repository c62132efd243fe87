"""The `provider` section of a cluster's YAML, checked, so that a slip is refused by `ray up` and not ignored.

Ray hands the section over as it stands, together with fields of its own (`RAYS`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rm.errors import InvalidSpec
from rm.providers.roster import Roster

RAYS = frozenset({"type", "module", "cache_stopped_nodes", "disable_node_updaters", "disable_launch_config_check",
                  "use_internal_ips", "use_external_head_ip", "foreground_node_launch",
                  "worker_liveness_check", "worker_rpc_drain"})  # fmt: skip
"""Fields of the section that are Ray's. Those that begin with an underscore are too."""
NO_CAPACITY = "NoCapacity"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class Failure(BaseModel):
    """How launches of a node type fail. `times`: so many, then they succeed; None: all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    category: Annotated[str, Field(min_length=1, max_length=19)] = "LaunchFailed"
    message: str = "refused on purpose by fail_types"
    times: Annotated[int, Field(gt=0)] | None = None


class Options(BaseModel):
    """What both providers take.

    `capacity`: node type → how many there can be at a time, whatever its `max_workers`. `fail_types`: node type → how
    its launches fail, as a message or with all fields of `Failure`. Both make it possible to see what becomes of a job
    when a cloud has no machine left. `boot_delay_s`: how long a node boots before commands can run on it; one number,
    or one for each node type.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    capacity: dict[str, Count] = Field(default_factory=dict)
    fail_types: dict[str, Failure] = Field(default_factory=dict)
    boot_delay_s: Seconds | dict[str, Seconds] = 0.0

    @field_validator("fail_types", mode="before")
    @classmethod
    def _messages(cls, value: Any) -> Any:
        """A bare text is the message."""
        if not isinstance(value, dict):
            return value
        return {name: {"message": each} if isinstance(each, str) else each for name, each in value.items()}

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Self:
        """The section `provider` as options. InvalidSpec: it names the field."""
        ours = {name: value for name, value in section.items() if name not in RAYS and name[:1] != "_"}
        try:
            return cls.model_validate(ours)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, ("provider", *first["loc"])))
            known = (
                f"; known are {', '.join(sorted(cls.model_fields))}"
                if first["type"] == "extra_forbidden"
                else ""
            )
            raise InvalidSpec(f"{field}: {first['msg']}{known}", field=field) from None

    def check_types(self, known: Mapping[str, Any]) -> None:
        """InvalidSpec where an option names a node type that `available_node_types` lacks."""
        delays = self.boot_delay_s if isinstance(self.boot_delay_s, dict) else {}
        for field, names in (
            ("capacity", self.capacity),
            ("fail_types", self.fail_types),
            ("boot_delay_s", delays),
        ):
            for name in names:
                if name not in known:
                    raise InvalidSpec(
                        f"provider.{field}.{name}: no such node type; known are {', '.join(sorted(known))}",
                        field=f"provider.{field}",
                    )

    def delay_s(self, node_type: str) -> float:
        return (
            self.boot_delay_s.get(node_type, 0.0)
            if isinstance(self.boot_delay_s, dict)
            else self.boot_delay_s
        )

    def refusal(self, node_type: str, count: int, roster: Roster) -> tuple[str, str] | None:
        """Why `count` more nodes of this type can't be had, as category and message; None if they can.

        All or none, as in a cloud. What was refused on purpose is counted in the roster, so that a restart of the
        autoscaler does not start anew.
        """
        failure = self.fail_types.get(node_type)
        if failure and (failure.times is None or roster.refused.get(node_type, 0) < failure.times):
            roster.refused[node_type] = roster.refused.get(node_type, 0) + 1
            return failure.category, failure.message
        most, there = self.capacity.get(node_type), roster.of_type(node_type)
        if most is not None and there + count > most:
            return (
                NO_CAPACITY,
                f"{node_type}: {count} asked for, {there} of {most} are in use (provider.capacity)",
            )
        return None


def check_name(name: str) -> None:
    """InvalidSpec: `name` is no name for a cluster, whose directory has it."""
    if not _NAME.fullmatch(name):
        raise InvalidSpec(
            f"cluster_name: {name!r} must be letters, digits, '.', '_' and '-'", field="cluster_name"
        )
