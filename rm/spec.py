"""What users may ask for, validated in one place: every message names the field and the way out.

`JobSpec` is the request as it travels and as the ledger keeps it. `Config` is the allocator's own settings,
read from `RM_*` environment variables by the client that starts it and handed over by value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from rm.core.model import Gang, Job, Kind, NodeShape, Strategy
from rm.core.resources import GPU_UNIT, gpu_units
from rm.core.shapes import Request, as_asked, resolve
from rm.errors import InvalidSpec
from rm.rights import is_name

MAX_GPUS = 100_000
MAX_ARRAY = 5_000
"""Jobs of an array, and of one submission: they are one transaction, for which everybody else's decisions wait."""
MAX_INLINE_BYTES = 16 * 2**20
"""The largest function with its arguments, or result, that travels by value."""
PRIORITY_NAMES = {"low": -100, "normal": 0, "high": 100}
_DURATION = re.compile(r"^\s*(?:(\d+)-)?(\d+):(\d{1,2}):(\d{1,2})\s*$")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Resources(BaseModel):
    """The GPUs of a request: `num_gpus` in all, or `nodes` × `gpus_per_node`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_gpus: float | None = None
    nodes: int | None = None
    min_nodes: int | None = None
    """An elastic gang: it starts with what there is, from so many bundles on up to `nodes`."""
    gpus_per_node: float | None = None
    gpu_type: tuple[str, ...] = ()
    cpus_per_gpu: float = 0.0
    memory_per_gpu: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    strategy: Strategy = Strategy.PACK

    @field_validator("num_gpus", "gpus_per_node", mode="before")
    @classmethod
    def _count(cls, value: Any, info: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be a number of GPUs, not {value!r}")
        if value != value or value <= 0:  # noqa: PLR0124 (NaN is the one value unlike itself)
            raise ValueError(f"must be more than 0, not {value!r}")
        if value > MAX_GPUS:
            raise ValueError(f"must be at most {MAX_GPUS}, not {value!r}")
        if value > 1 and value != int(value):
            raise ValueError(
                f"above 1 must be a whole number, not {value!r}; use {int(value)} or {int(value) + 1}"
            )
        if value < 1 and gpu_units(value) == 0:
            raise ValueError(f"below 0.0001 of a GPU can't be accounted, got {value!r}")
        return value

    @field_validator("nodes", "min_nodes", mode="before")
    @classmethod
    def _nodes(cls, value: Any) -> Any:
        return _whole_number(value, "nodes", MAX_GPUS)

    @field_validator("gpu_type", mode="before")
    @classmethod
    def _types(cls, value: Any) -> Any:
        if value is None:
            return ()
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        if not all(isinstance(each, str) and each for each in value):
            raise ValueError("must be a GPU type such as 'A100', or a list of them in order of preference")
        return tuple(value)

    @field_validator("cpus_per_gpu")
    @classmethod
    def _cpus(cls, value: float) -> float:
        if not 0 <= value <= 10_000:
            raise ValueError(f"must be from 0 to 10000, not {value!r}")
        return value

    @field_validator("memory_per_gpu", mode="before")
    @classmethod
    def _memory(cls, value: Any) -> Any:
        return parse_bytes(value)

    @field_validator("strategy", mode="before")
    @classmethod
    def _strategy(cls, value: Any) -> Any:
        if isinstance(value, str) and value.upper() in Strategy.__members__:
            return Strategy[value.upper()]
        if isinstance(value, Strategy):
            return value
        raise ValueError(f"must be one of {', '.join(Strategy.__members__)}, not {value!r}")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.num_gpus is not None and self.gpus_per_node is not None:
            raise ValueError("give num_gpus, or nodes with gpus_per_node, not both")
        if self.num_gpus is None and self.gpus_per_node is None:
            raise ValueError("num_gpus is missing: say how many GPUs the job needs, for example num_gpus=1")
        if self.num_gpus is not None and self.nodes is not None:
            if self.num_gpus < 1:
                raise ValueError(
                    f"num_gpus={self.num_gpus} is a share of one device and can't be spread over "
                    f"nodes={self.nodes}; leave nodes out, or ask for whole GPUs"
                )
            if self.num_gpus % self.nodes:
                raise ValueError(
                    f"num_gpus={self.num_gpus:g} can't be divided equally over nodes={self.nodes}; "
                    f"use a multiple of {self.nodes}"
                )
        if self.min_nodes is not None and (self.nodes is None or self.min_nodes > self.nodes):
            raise ValueError(
                f"min_nodes={self.min_nodes} needs a nodes= that is at least as much: the gang has from min_nodes "
                "to nodes bundles"
            )
        if self.gpus_per_node is not None and self.gpus_per_node < 1 and (self.nodes or 1) > 1:
            raise ValueError(
                f"gpus_per_node={self.gpus_per_node} on nodes={self.nodes}: a share of a device can't be a gang; "
                "use one node, or whole GPUs"
            )
        return self

    def request(self) -> Request:
        """The same in the core's words."""
        nodes, per_node = self.nodes, self.gpus_per_node
        if self.num_gpus is not None and nodes is not None:
            per_node = self.num_gpus / nodes
        elif per_node is not None:
            nodes = nodes or 1
        return Request(
            gpu_units=gpu_units(self.num_gpus) if self.num_gpus is not None and nodes is None else None,
            nodes=nodes,
            gpu_units_per_node=gpu_units(per_node) if per_node is not None else None,
            cpu_milli_per_gpu=round(self.cpus_per_gpu * 1000),
            memory_bytes_per_gpu=self.memory_per_gpu,
            strategy=self.strategy,
            gpu_types=self.gpu_type,
            labels=tuple(sorted(self.labels.items())),
        )

    def gang(self, shapes: Sequence[NodeShape]) -> Gang:
        """The gang on a cluster that has, or can launch, `shapes`. Raises InvalidSpec, Infeasible."""
        request = self.request()
        if self.min_nodes is None or self.min_nodes == request.nodes:
            return resolve(request, shapes)
        # What it can surely have is its minimum: more is welcome where there is room.
        assert request.nodes is not None
        least = resolve(replace(request, nodes=self.min_nodes), shapes)
        return replace(least, count=request.nodes, least=self.min_nodes)

    def gang_as_asked(self) -> Gang:
        """The gang where it is not known what the cluster has or can launch."""
        gang = as_asked(self.request())
        return gang if self.min_nodes in (None, gang.count) else replace(gang, least=self.min_nodes)

    @property
    def to_be_cut(self) -> bool:
        """Whether the nodes decide how many bundles it is."""
        return self.nodes is None and self.num_gpus is not None and self.num_gpus > 1


class JobSpec(BaseModel):
    """One request, as submitted. Durations are seconds; `rm.client` and `rmctl` also take "90m", "2h", "1:30:00"."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    kind: Kind
    name: str = ""
    owner: str = ""
    queue: str = ""
    """Empty: the cluster's default queue."""
    priority: int | None = None
    """None: the queue's default."""
    resources: Resources
    command: tuple[str, ...] = ()
    """Words of the command; a single string given by the user has become ["bash", "-c", string]."""
    payload_sha256: str = ""
    """For functions: the blob that holds the pickled function and arguments."""
    nproc_per_node: int | Literal["gpu"] = 1
    working_dir_sha256: str = ""
    """The blob that holds the zipped working directory; empty: an empty scratch directory."""
    cwd: str = ""
    """Where the submitter stood. Commands without a working_dir run there, where the node has that directory."""
    env: dict[str, str] = Field(default_factory=dict, repr=False)
    """May hold secrets, so that nothing may show it: neither a log that prints a request nor an error."""
    runtime_env: dict[str, Any] = Field(default_factory=dict, repr=False)
    """What Ray itself sets up for the runner: pip, conda, image and the like."""
    python: str = ""
    """Version of the submitter's Python, "3.11": functions by value need the same one."""
    time_limit_s: float | None = None
    grace_s: float = 30.0
    max_retries: int = 0
    max_infra_retries: int = 3
    preemptible: bool = True
    min_runtime_s: float = 0.0
    """How long after its start it is spared from eviction."""
    after: tuple[str, ...] = ()
    """Jobs, or arrays of jobs, that must succeed first."""
    array: int | None = None
    """So many jobs under one id, each with its index in RM_ARRAY_INDEX."""
    hold: bool = False
    """Queued, but not started before `release`."""
    ttl_s: float | None = None
    """Attached jobs and leases: the longest silence of the holder before the job is cancelled."""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not is_name(value):
            raise ValueError("must be at most 200 printable characters")
        return value

    @field_validator("queue")
    @classmethod
    def _queue(cls, value: str) -> str:
        if value and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}", value):
            raise ValueError(f"must be a queue's name (letters, digits, '.', '_', '-', '/'), not {value!r}")
        return value

    @field_validator("priority", mode="before")
    @classmethod
    def _priority(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str) and value in PRIORITY_NAMES:
            return PRIORITY_NAMES[value]
        try:
            number = int(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"must be a whole number or one of {', '.join(PRIORITY_NAMES)}, not {value!r}"
            ) from None
        if not -1_000_000 <= number <= 1_000_000:
            raise ValueError(f"must be from -1000000 to 1000000, not {number}")
        return number

    @field_validator("time_limit_s", "grace_s", "ttl_s", "min_runtime_s", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        return parse_duration(value)

    @field_validator("time_limit_s", "ttl_s")
    @classmethod
    def _positive(cls, value: float | None) -> float | None:
        if value is not None and value <= 0:
            raise ValueError(f"must be more than 0 seconds, not {value:g}")
        return value

    @field_validator("nproc_per_node", mode="before")
    @classmethod
    def _nproc(cls, value: Any) -> Any:
        if value == "gpu":
            return value
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
            raise ValueError(f"must be 'gpu' or a number from 1 to 1024, not {value!r}")
        return value

    @field_validator("max_retries", "max_infra_retries")
    @classmethod
    def _retries(cls, value: int) -> int:
        if not 0 <= value <= 1000:
            raise ValueError(f"must be from 0 to 1000, not {value}")
        return value

    @field_validator("preemptible", "hold", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError(f"must be True or False, not {value!r}")
        return value

    @field_validator("after", mode="before")
    @classmethod
    def _after(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        elif isinstance(value, int):
            value = [value]
        if not isinstance(value, Sequence):
            raise ValueError(f"must be a job's id or a list of them, not {value!r}")
        return tuple(dict.fromkeys(_job_id(each) for each in value))

    @field_validator("array", mode="before")
    @classmethod
    def _array(cls, value: Any) -> Any:
        return _whole_number(value, "jobs", MAX_ARRAY)

    @field_validator("env")
    @classmethod
    def _env(cls, value: dict[str, str]) -> dict[str, str]:
        for key, text in value.items():
            if not key or "=" in key or "\0" in key:
                # What stands behind "=" was meant as the value.
                name = key.partition("=")[0]
                raise ValueError(f"{name!r} is not a usable name of an environment variable")
            if "\0" in text:
                raise ValueError(f"the value of {key} holds a NUL byte")
        return value

    @model_validator(mode="after")
    def _something_to_run(self) -> Self:
        if self.kind is Kind.COMMAND and (not self.command or not self.command[0].strip()):
            raise ValueError("the command is empty: say what to run")
        if self.kind is Kind.COMMAND and any("\0" in word for word in self.command):
            raise ValueError("the command holds a NUL byte")
        if self.kind is Kind.FUNCTION and not self.payload_sha256:
            raise ValueError("payload_sha256 is missing")
        if self.kind is Kind.LEASE and self.ttl_s is None:
            raise ValueError("a lease needs ttl_s")
        if self.kind is Kind.LEASE and self.array is not None:
            raise ValueError("array is for jobs: take a lease for each")
        return self

    def job(self, job_id: str, seq: int, gang: Gang, now: float) -> Job:
        """The core's record of this request once it is accepted. Whoever accepts it fills in the queue's defaults."""
        return Job(
            id=job_id,
            seq=seq,
            name=self.name or job_id,
            owner=self.owner,
            kind=self.kind,
            gang=gang,
            submitted_at=now,
            queue=self.queue or "default",
            priority=self.priority or 0,
            time_limit_s=self.time_limit_s,
            grace_s=self.grace_s,
            max_retries=self.max_retries,
            max_infra_retries=self.max_infra_retries,
            ttl_s=self.ttl_s,
            preemptible=self.preemptible,
            min_runtime_s=self.min_runtime_s,
            after=self.after,
            held=self.hold,
            held_by=self.owner if self.hold else "",
        )

    def processes_per_bundle(self, bundle_units: int) -> int:
        """How many ranks run in one bundle of `bundle_units`."""
        if self.nproc_per_node == "gpu":
            return max(1, bundle_units // GPU_UNIT)
        return self.nproc_per_node


RESOURCE_FIELDS = frozenset(Resources.model_fields)


def _job_id(value: Any) -> str:
    """ "j17" from "j17", "17" or 17; also "j17_3"."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        text = str(value)
        if re.fullmatch(r"j?[0-9]+(_[0-9]+)?", text):
            return text if text.startswith("j") else f"j{text}"
    raise ValueError(f"must be job ids such as 'j17', not {value!r}")


def _whole_number(value: Any, of_what: str, most: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number of {of_what}, not {value!r}")
    if not 1 <= value <= most:
        raise ValueError(f"must be from 1 to {most}, not {value!r}")
    return value


def parse_duration(value: Any) -> float | None:
    """Seconds from 90, "90", "90s", "15m", "2h", "1d", "1:30:00" or "1-12:00:00". Raises ValueError."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        if value is not None and (value != value or abs(value) == float("inf") or value < 0):  # noqa: PLR0124
            raise ValueError(f"must be a finite number of seconds, not {value!r}")
        return value
    if isinstance(value, str):
        if clock := _DURATION.match(value):
            days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
            return float(days * 86400 + hours * 3600 + minutes * 60 + seconds)
        if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", value):
            return float(match[1]) * _UNITS_S[match[2] or "s"]
    raise ValueError(f"must be a duration such as 90, '15m', '2h' or '1:30:00', not {value!r}")


def parse_bytes(value: Any) -> int:
    """Bytes from 1073741824, "1GiB", "512M", "2g". Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**60:
        return int(value)
    if isinstance(value, str) and (
        match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", value.lower())
    ):
        return int(float(match[1]) * _BYTES[match[2]])
    raise ValueError(f"must be an amount of memory such as '16GiB', not {value!r}")


def build_spec(**fields: Any) -> JobSpec:
    """A JobSpec from flat keyword arguments (resource fields beside the others).

    Raises InvalidSpec whose message names each bad field.
    """
    nested = {key: fields.pop(key) for key in list(fields) if key in RESOURCE_FIELDS}
    known = set(JobSpec.model_fields) - {"resources"}
    for key in fields:
        if key not in known:
            raise InvalidSpec(
                f"{key}: unknown option; {did_you_mean(key, known | RESOURCE_FIELDS)}", field=key
            )
    nested = {key: value for key, value in nested.items() if value is not None}
    fields = {key: value for key, value in fields.items() if value is not None}
    try:
        return JobSpec(resources=Resources(**nested), **fields)
    except ValidationError as error:
        raise as_invalid_spec(error) from None


def as_invalid_spec(error: ValidationError) -> InvalidSpec:
    """Our own error for pydantic's: one line per bad field, the way the user named it."""
    lines = []
    first = None
    for each in error.errors():
        field = ".".join(str(part) for part in each["loc"] if part != "resources").removesuffix("_s")
        message = each["msg"].removeprefix("Value error, ")
        first = first or field or message.split("=")[0].split(" ")[0]
        lines.append(f"{field}: {message}" if field else message)
    return InvalidSpec("; ".join(lines), field=first)


def did_you_mean(key: str, known: set[str] | frozenset[str]) -> str:
    """The nearest known name, or all of them: the end of an error message."""
    import difflib

    near = difflib.get_close_matches(key, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"


class Config(BaseSettings):
    """Settings of one allocator. Set by `RM_<NAME>` in the environment of whoever starts it."""

    model_config = SettingsConfigDict(
        env_prefix="RM_", frozen=True, extra="ignore", hide_input_in_errors=True
    )

    home: Path = Path("~/.ray-rm")
    """Ledger, logs, checkpoints and blobs, on the head node. Outlives Ray's session directory."""
    ledger_url: str = Field("", repr=False)
    """SQLAlchemy URL. Empty: SQLite in `home`."""
    checkpoint_root: str = ""
    """Where jobs keep checkpoints. On several machines this must be a shared file system. Empty: in `home`."""
    node_poll_s: Annotated[float, Field(gt=0)] = 0.5
    """How often Ray's view of the nodes is read when nothing is in transition."""
    audit_every_s: Annotated[float, Field(gt=0)] = 30.0
    """How long after one audit the next begins."""
    reserve_timeout_s: Annotated[float, Field(gt=0)] = 20.0
    """How long a pinned placement group may stay pending before the plan is given up and made anew."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long runners may take to start, runtime_env (pip) included."""
    keep_warm_s: Annotated[float, Field(ge=0)] = 2.0
    """How long the placement group and the runners of an attempt stay for the next one of the kind. 0: not at all.

    For jobs their GPUs are free; other work on the Ray cluster gets them when the time is over.
    """
    autoscaling_config: Path = Path("~/ray_bootstrap_config.yaml")
    """The configuration that the Ray autoscaler reads, on the head: the labels of its node types stand nowhere else."""
    max_pending: Annotated[int, Field(gt=0)] = 100_000
    """Most jobs that may wait, everybody's together."""
    max_pending_per_owner: Annotated[int, Field(gt=0)] = 25_000
    """Most jobs that one owner may have waiting: nobody takes up everybody's place."""
    max_log_bytes: Annotated[int, Field(gt=0)] = 2**30
    """Most that one rank's stdout or stderr may keep in the log store; the rest is dropped and counted."""

    store_keep_days: Annotated[float, Field(gt=0)] = 30.0
    """How long logs and results of ended jobs are kept."""
    store_keep_bytes: Annotated[int, Field(gt=0), BeforeValidator(parse_bytes)] = 50 * 2**30
    """What the store may take in all; beyond it the oldest logs and results of ended jobs go earlier."""

    def resolved(self) -> Config:
        """The same with absolute paths and a full ledger URL."""
        home = self.home.expanduser().absolute()
        return self.model_copy(
            update={
                "home": home,
                "ledger_url": self.ledger_url or f"sqlite:///{home / 'ledger.sqlite'}",
                "checkpoint_root": self.checkpoint_root or str(home / "checkpoints"),
                "autoscaling_config": self.autoscaling_config.expanduser().absolute(),
            }
        )


def default_owner() -> str:
    """The user's name as the operating system knows it."""
    import getpass

    try:
        return os.environ.get("RM_OWNER") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
