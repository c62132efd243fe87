"""A cluster file as Ray reads it, with the lines of its fields.

The values are those of `yaml.safe_load`, which is what `ray up` uses; the lines, and the errors for what Ray would
take without a word (a field that is given twice), are of `rm.yaml_text`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from rm.cluster_files.findings import Finding, Severity
from rm.cluster_files.machines import Machine, machine
from rm.core.model import GPU_TYPE
from rm.yaml_text import Document, Path, read

CLOUDS = frozenset({"aws", "gcp", "azure", "aliyun", "vsphere"})
"""Providers whose nodes are machines that boot, bill, and have addresses that others could reach."""
CLOUD_BOOT_S = 300.0
"""What a GPU machine of a cloud takes until its Ray answers, image and packages included, where nobody says it."""
Commands = tuple[tuple[Path, str], ...]


@dataclass(frozen=True, slots=True)
class NodeType:
    """One of `available_node_types`. `machine`: what the cloud says about it, where we know it."""

    name: str
    path: Path
    is_head: bool
    given: Mapping[str, Any]
    machine: Machine | None

    def part(self, name: str) -> dict[str, Any]:
        found = self.given.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def labels(self) -> dict[str, str]:
        return self.part("labels")

    @property
    def gpus(self) -> int:
        """GPUs of one node: as written, else as Ray finds them for the machine."""
        written = self.part("resources").get("GPU")
        if isinstance(written, int):
            return written
        return self.machine.gpus if self.machine else 0

    @property
    def gpu_type(self) -> str:
        """What jobs can ask for by `gpu_type`; "" without the label."""
        return str(self.labels.get(GPU_TYPE, ""))

    @property
    def least(self) -> int:
        return _count(self.given.get("min_workers"), 0)

    def most(self, of_all: int) -> int:
        """Most nodes of it, with Ray's default where the file says nothing. The head is counted as one."""
        written = _count(self.given.get("max_workers"), 0 if self.is_head else of_all)
        return min(written, of_all) + self.is_head


class ClusterFile:
    """Typed looks at a file whose shape nobody has judged yet: what has a wrong type counts as absent."""

    def __init__(self, value: dict[str, Any], document: Document) -> None:
        self.value = value
        self._document = document

    def line(self, path: Path) -> int | None:
        return self._document.line(path)

    def error(self, rule: str, path: Path, message: str, advice: str) -> Finding:
        return Finding(Severity.ERROR, rule, ".".join(path), self.line(path), message, advice)

    def warning(self, rule: str, path: Path, message: str, advice: str) -> Finding:
        return Finding(Severity.WARNING, rule, ".".join(path), self.line(path), message, advice)

    def part(self, name: str) -> dict[str, Any]:
        found = self.value.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def provider(self) -> str:
        return str(self.part("provider").get("type", ""))

    @property
    def is_cloud(self) -> bool:
        return self.provider in CLOUDS

    @property
    def boot_s(self) -> float:
        """Seconds from the request for a node to its Ray: `metadata.boot_minutes`, else a guess; 0 off the clouds."""
        said = self.part("metadata").get("boot_minutes")
        if isinstance(said, int | float) and not isinstance(said, bool):
            return said * 60.0
        return CLOUD_BOOT_S if self.is_cloud else 0.0

    @property
    def max_workers(self) -> int | None:
        found = self.value.get("max_workers")
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @cached_property
    def node_types(self) -> tuple[NodeType, ...]:
        head = self.value.get("head_node_type")
        return tuple(
            NodeType(
                str(name),
                ("available_node_types", str(name)),
                name == head,
                given,
                machine(self.provider, given.get("node_config")),
            )
            for name, given in self.part("available_node_types").items()
            if isinstance(given, dict)
        )

    def commands(self, *fields: str) -> Commands:
        """The shell commands of these fields, each with its path."""
        return tuple(self._commands(fields))

    def _commands(self, fields: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
        for name in fields:
            given = self.value.get(name)
            for place, command in enumerate(given if isinstance(given, list) else ()):
                yield (name, str(place)), str(command)


def read_cluster_file(text: str) -> ClusterFile:
    """Raises InvalidSpec with line and column where it is not YAML, and where it is no cluster file at all."""
    from rm.errors import InvalidSpec

    document = read(text)
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise InvalidSpec("must be the fields of a cluster, such as `cluster_name:` and `provider:`")
    if value.get("apiVersion"):
        raise InvalidSpec(
            "this is a manifest for Kubernetes, and `ray up` can't use it; see docs/kubernetes.md"
        )
    return ClusterFile({str(key): each for key, each in value.items()}, document)


def _count(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
