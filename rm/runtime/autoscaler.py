"""What the Ray autoscaler says: its node types, what it launches, what it could not, what it takes away; as events.

Ray's own autoscaler publishes its node types nowhere (2.60, v2), so they are read where it reads them itself: in the
file that `ray up` leaves on the head (`RM_AUTOSCALING_CONFIG` names another). A type's GPU type is its label, or what
stands behind Ray's resource `accelerator_type:`.

Until they are read they are *awaited* where an autoscaler may run: the file is there and can't be read yet, KubeRay has
started one in a container of its own, or the GCS does not answer. Nothing is refused for them meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rm.core.events import (
    Event,
    LaunchesObserved,
    LaunchFailed,
    NodeCordoned,
    NodeTypesObserved,
    NodeUncordoned,
)
from rm.core.model import GPU_TYPE, NodeShape
from rm.core.records import replace

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import NodeInfo

log = logging.getLogger("rm.autoscaler")

BY = "autoscaler"
"""In whose name nodes are cordoned that it takes away."""
TYPES_S = 60.0
"""Between two looks at the node types: they change with `ray up`."""
BUSY_S, CALM_S = 1.0, 10.0
"""Between two looks at the launches: while something is wanted or boots, and else."""
HURRY_S = 0.25
"""Between two looks at least, whoever asks for one."""
MOST_OF_A_TYPE = 1000
"""Where a type has no bound."""
MESSAGE_CHARS = 500
LOG_BYTES = 2**18
"""Of the end of the autoscaler's log in which a failure's words are looked for."""
KUBERAY_COMMAND = "KUBERAY_GEN_RAY_START_CMD"
"""How KubeRay has started this pod's Ray: the head's has no monitor where the autoscaler is a container beside it."""
_ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True, slots=True)
class LaunchType:
    """A node type in the words of Ray. `resources`, `labels`: what the autoscaler expects a node of it to have.

    `least`: so many of its nodes stay although they are idle.
    """

    shape: NodeShape
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    least: int = 0

    @property
    def accelerator(self) -> str | None:
        """The name of the resource by which Ray marks the GPU type, if the type declares it."""
        return next((name for name in self.resources if name.startswith(_ACCELERATOR)), None)


class Autoscaler:
    """Reads and posts what changed. `busy()`: whether something is wanted."""

    def __init__(
        self,
        post: Callable[[Event], None],
        *,
        clock: Callable[[], float],
        busy: Callable[[], bool],
        config_file: Path,
    ) -> None:
        self._post = post
        self._clock = clock
        self._busy = busy
        self._file = config_file
        self.types: dict[str, LaunchType] = {}
        self._types_at = -TYPES_S
        self._began = time.monotonic()
        self._told = NodeTypesObserved(0.0, ())
        """What was last posted of the types; nothing was."""
        self._read = False
        """Whether the types could ever be read, be they none."""
        self._staying: dict[str, tuple[str, ...]] = {}
        """By type, the nodes that stay although they are idle."""
        self._launches: LaunchesObserved | None = None
        self._failed: set[tuple[str, int, int, str]] | None = None
        self._leaving: set[str] = set()
        self._hurry = asyncio.Event()

    def hurry(self) -> None:
        """Look soon: something is wanted for the first time; or a group waits that should have been made, so that
        perhaps Ray takes a node away."""
        self._hurry.set()

    async def run(self) -> None:
        """Look for ever. A look that fails (the GCS restarts) is logged, and the next one comes."""
        failures = 0
        while True:
            try:
                await self.look()
                failures = 0
            except Exception:
                failures += 1
                if failures in (1, 10, 100):
                    log.warning("the autoscaler can't be read (%d times in a row)", failures, exc_info=True)
            booting = bool(self._launches and self._launches.booting)
            # A head that has just started publishes its node types some seconds later.
            young = not self.types and self._young
            await asyncio.sleep(HURRY_S)
            pause_s = BUSY_S if young or booting or self._busy() else CALM_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), pause_s - HURRY_S)
            self._hurry.clear()

    @property
    def _young(self) -> bool:
        return time.monotonic() - self._began < TYPES_S

    async def look(self) -> None:
        """One look, and the events that it brings."""
        if not self.types or time.monotonic() - self._types_at >= TYPES_S:
            try:
                found = await asyncio.to_thread(read_types, self._file)
            except Exception:
                if not self._read:
                    self._tell_types((), None, awaited=True)
                raise
            self._read, self._types_at = True, time.monotonic()
            self.types = found.types
            awaited = not found.types and self._young and (found.unreadable or _beside_kuberay())
            shapes = tuple(each.shape for each in found.types.values())
            self._tell_types(shapes, found.most_in_all, awaited=awaited)
        status = await asyncio.to_thread(_read_status)
        if self.types:
            self._report(status)
        nodes = [*status.active_nodes, *status.idle_nodes]
        self._report_leaving(
            {each.node_id for each in nodes if each.node_status == "DRAINING"},
            {each.node_id for each in nodes},
            self._clock(),
        )

    def _tell_types(self, shapes: tuple[NodeShape, ...], most_in_all: int | None, *, awaited: bool) -> None:
        told = NodeTypesObserved(0.0, shapes, most_in_all, awaited)
        if told != self._told:
            self._told = told
            self._post(NodeTypesObserved(self._clock(), shapes, most_in_all, awaited))

    def _report(self, status: Any) -> None:
        now = self._clock()
        nodes = [*status.active_nodes, *status.idle_nodes]
        up = Counter(each.ray_node_type_name for each in nodes if each.ray_node_type_name in self.types)
        booting = Counter(each.ray_node_type_name for each in status.pending_nodes)
        for each in status.pending_launches:
            booting[each.ray_node_type_name] += each.count
        seen = LaunchesObserved(
            0.0,
            tuple(sorted(up.items())),
            tuple(sorted(booting.items())),
            self._short(nodes),
            self._returnable(nodes),
        )
        if seen != self._launches:
            self._launches = seen
            self._post(replace(seen, at=now))
        self._report_failures(status, now)

    def _short(self, nodes: Iterable[NodeInfo]) -> tuple[tuple[str, int, int], ...]:
        """As in `LaunchesObserved`. Of a node that has not reported what it has, nothing is said."""
        gpus: dict[str, list[int]] = {}
        for node in nodes:
            declared, has = self.types.get(node.ray_node_type_name), node.total_resources()
            if declared is not None and has and int(has.get("GPU", 0)) < declared.shape.gpu_slots:
                gpus.setdefault(node.ray_node_type_name, []).append(int(has.get("GPU", 0)))
        return tuple((name, len(each), min(each)) for name, each in sorted(gpus.items()))

    def _returnable(self, nodes: Iterable[NodeInfo]) -> tuple[str, ...]:
        """The nodes beyond those that each type keeps anyway: who was kept before is kept on."""
        ids: dict[str, list[str]] = {}
        for node in nodes:
            if node.node_id and node.ray_node_type_name in self.types:
                ids.setdefault(node.ray_node_type_name, []).append(node.node_id)
        found: list[str] = []
        for name, there in ids.items():
            before = self._staying.get(name, ())
            there.sort(key=lambda node_id: (node_id not in before, node_id))
            least = self.types[name].least
            self._staying[name] = tuple(there[:least])
            found += there[least:]
        return tuple(sorted(found))

    def _report_failures(self, status: Any, now: float) -> None:
        """Those that are new. What had failed before the first look is history."""
        failed = {
            (each.ray_node_type_name, each.request_ts_s, each.failed_ts_s or 0, str(each.details or ""))
            for each in status.failed_launches
        }
        before = failed if self._failed is None else self._failed
        for name, _, _, details in sorted(failed - before):
            self._post(LaunchFailed(now, name, provider_words(name, details, _log_file())))
        self._failed = failed

    def _report_leaving(self, draining: set[str], alive: set[str], now: float) -> None:
        """Nodes that Ray drains take nothing new, and what runs there is told to save its work and go on elsewhere."""
        for node_id in sorted(draining - self._leaving):
            self._post(NodeCordoned(now, node_id, BY, "Ray takes the node away", True, now))
        for node_id in sorted(self._leaving - alive):
            self._post(NodeUncordoned(now, node_id, BY))
        self._leaving = (self._leaving | draining) & alive


def provider_words(node_type: str, details: str, log_file: Path | None) -> str:
    """The provider's message: what the autoscaler reports of it, else what it has logged last about the type.

    In Ray 2.60 the report leaves the provider's own error out.
    """
    words = " ".join(details.split())
    if not words or words.endswith(":"):
        words = _logged(node_type, log_file) or words or "the provider gave no reason"
    return words if len(words) <= MESSAGE_CHARS else words[: MESSAGE_CHARS - 1] + "…"


def _logged(node_type: str, log_file: Path | None) -> str:
    try:
        if log_file is None:
            return ""
        with log_file.open("rb") as file:
            file.seek(max(0, log_file.stat().st_size - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""  # the allocator is not on the head
    said = re.findall(rf"Failed to launch \d+ nodes of type {re.escape(node_type)}: (.+)", text)
    return str(said[-1]).strip() if said else ""


def _log_file() -> Path | None:
    """Where the autoscaler logs, if this is the head."""
    from ray._private.worker import global_worker

    node = global_worker.node
    return Path(node.get_logs_dir_path(), "monitor.log") if node is not None else None


@dataclass(frozen=True, slots=True)
class Types:
    """The worker types by name, and the most nodes of all. `unreadable`: there is a file, and it says nothing yet."""

    types: dict[str, LaunchType]
    most_in_all: int | None = None
    unreadable: bool = False


def read_types(config_file: Path) -> Types:
    """What can be launched. Empty where no autoscaler is known of.

    Other autoscalers than Ray's own (Kubernetes, Anyscale) publish the types in Ray's tables, without labels.
    """
    from ray._private.state import state

    said_in_file = _read_file(config_file)
    config = said_in_file or {}
    types = {}
    for name, said in (config.get("available_node_types") or {}).items():
        labels = {key: str(value) for key, value in (said.get("labels") or {}).items()}
        least, most = said.get("min_workers", 0), said.get("max_workers", 0)
        types[name] = launch_type_of(name, said.get("resources") or {}, labels, most, least)
    published = state.get_cluster_config()
    for each in published.node_group_configs if published is not None else ():
        if each.name not in types:
            resources = dict(each.resources)
            types[each.name] = launch_type_of(each.name, resources, {}, each.max_count, each.min_count)
    most = config.get("max_workers")
    return Types(
        {name: each for name, each in types.items() if each.shape.most},
        most if isinstance(most, int) else None,
        said_in_file is None,
    )


def _beside_kuberay() -> bool:
    return "--no-monitor" in os.environ.get(KUBERAY_COMMAND, "")


def launch_type_of(
    name: str, resources: dict[str, float], labels: dict[str, str], most: int, least: int = 0
) -> LaunchType:
    """`most` below 0: without a bound. `least`: so many stay although they are idle."""
    marked = next((key.removeprefix(_ACCELERATOR) for key in resources if key.startswith(_ACCELERATOR)), None)
    told = {GPU_TYPE: marked, **labels} if marked else labels
    shape = NodeShape(
        gpu_slots=int(resources.get("GPU", 0)),
        cpu_milli=round(resources.get("CPU", 0) * 1000),
        memory_bytes=int(resources.get("memory", 0)),
        labels=tuple(sorted(told.items())),
        most=most if most >= 0 else MOST_OF_A_TYPE,
        name=name,
    )
    return LaunchType(shape, resources, labels, least)


def _read_file(path: Path) -> dict[str, Any] | None:
    """None where there is a file that can't be read."""
    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("%s can't be read, so the labels of node types are not known: %s", path, error)
        return None
    return config if isinstance(config, dict) else None


def _read_status() -> Any:
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    return get_cluster_status(ray.get_runtime_context().gcs_address)
