"""The rules in their order, over one file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rm.cluster_files import ec2
from rm.cluster_files.commands import command_doubts
from rm.cluster_files.file import ClusterFile, read_cluster_file
from rm.cluster_files.findings import Finding, Severity
from rm.cluster_files.network import network_doubts
from rm.cluster_files.node_types import node_type_doubts
from rm.cluster_files.ray_schema import ray_errors
from rm.cluster_files.sizes import quota_doubts, size_doubts
from rm.core.policy import Policy
from rm.errors import InvalidSpec

_SHAPE = frozenset({"type", "schema"})
"""Rules whose findings mean that other rules could not read what they look at."""


@dataclass(frozen=True, slots=True)
class Report:
    """`findings`: by line. `not_checked`: what could not be looked at here, and why."""

    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...] = ()

    @property
    def has_errors(self) -> bool:
        return any(each.severity is Severity.ERROR for each in self.findings)


def check(text: str, policy: Policy | None = None) -> Report:
    """Every finding in the text of a cluster file. `policy`: of the rm.yaml that is to be in force there."""
    try:
        file = read_cluster_file(text)
    except InvalidSpec as error:
        line = re.search(r"\bline (\d+)", error.message)
        return Report(
            (Finding(Severity.ERROR, "yaml", "", int(line[1]) if line else None, error.message, "mend it"),)
        )
    findings = list(ray_errors(file))
    if not any(each.rule in _SHAPE for each in findings):
        findings += _doubts(file, policy)
    not_checked = []
    if file.provider == "aws" and not ec2.is_installed():
        not_checked.append("node_config was not compared with the EC2 API: install boto3 for that")
    findings.sort(key=lambda each: each.line or 0)
    return Report(tuple(findings), tuple(not_checked))


def _doubts(file: ClusterFile, policy: Policy | None) -> Iterator[Finding]:
    yield from node_type_doubts(file)
    yield from size_doubts(file)
    yield from command_doubts(file)
    yield from network_doubts(file)
    if ec2.is_installed():
        yield from ec2.ec2_errors(file)
    if policy is not None and file.node_types:
        yield from quota_doubts(file, policy)
