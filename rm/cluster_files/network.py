"""Who can reach the nodes: AWS security groups, and where Ray makes one that is wider than it need be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rm.cluster_files.file import ClusterFile
from rm.cluster_files.findings import Finding

_WORLD = frozenset({"0.0.0.0/0", "::/0"})


def network_doubts(file: ClusterFile) -> Iterator[Finding]:
    """Rules for AWS only; other clouds are closed by networks that no cluster file describes."""
    if file.provider != "aws":
        return
    group = file.part("provider").get("security_group")
    rules = group.get("IpPermissions") if isinstance(group, dict) else None
    for place, rule in enumerate(rules if isinstance(rules, list) else ()):
        if isinstance(rule, dict) and (open_to := _WORLD & set(_ranges(rule))):
            first, last = rule.get("FromPort", "all"), rule.get("ToPort", "all")
            ports = f"port {first}" if first == last else f"ports {first} to {last}"
            yield file.error(
                "open-port",
                ("provider", "security_group", "IpPermissions", str(place)),
                f"opens {ports} to the world ({', '.join(sorted(open_to))})",
                "name the addresses of your own network, or take the rule out",
            )
    named = isinstance(group, dict) and group.get("GroupName")
    if not named and not all("SecurityGroupIds" in each.part("node_config") for each in file.node_types):
        yield file.warning(
            "ssh-open",
            ("provider", "security_group"),
            "is left to Ray, which makes a group that lets the whole world knock at port 22",
            "name one that you have made: deploy/aws_prepare.py makes it (docs/cluster.md)",
        )


def _ranges(rule: dict[str, Any]) -> Iterator[str]:
    for name, key in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
        for each in rule.get(name) or ():
            if isinstance(each, dict):
                yield str(each.get(key, ""))
