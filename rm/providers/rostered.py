"""What node providers share that keep their nodes in a roster: the answers to Ray, and the refusal to launch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from rm.errors import ClusterError
from rm.providers.options import Options
from rm.providers.roster import Node, Roster, RosterFile


class RosteredProvider(NodeProvider):  # type: ignore[misc]
    """A provider whose nodes are in `self._file`. It keeps nothing in memory: other processes change the roster too.

    A node's id is never used again; Ray relies on that.
    """

    def __init__(
        self, section: dict[str, Any], cluster_name: str, options: Options, file: RosterFile
    ) -> None:
        super().__init__(section, cluster_name)
        self._options = options
        self._file = file
        cache = section.get("_config_cache_path")
        self._files = [cache] if isinstance(cache, str) else []
        """What Ray itself keeps of the cluster elsewhere, a copy of its configuration."""

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        nodes = self._file.read().nodes
        return [name for name, node in nodes.items() if tag_filters.items() <= node.tags.items()]

    def is_running(self, node_id: str) -> bool:
        """Whether commands can run on the node: it is there, has booted and is not being ended."""
        node = self._file.read().nodes.get(node_id)
        return node is not None and not node.ending and not self._boots(node)

    def is_terminated(self, node_id: str) -> bool:
        node = self._file.read().nodes.get(node_id)
        return node is None or node.ending

    def node_tags(self, node_id: str) -> dict[str, str]:
        """The node's tags; none for a node that is gone, about which Ray's threads may still ask."""
        node = self._file.read().nodes.get(node_id)
        return dict(node.tags) if node else {}

    def set_node_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        """Nothing happens for a node that is gone, about which Ray's threads may still have news."""
        with suppress(FileNotFoundError), self._file.changing() as roster:
            if node := roster.nodes.get(node_id):
                node.tags.update(tags)
            self._keep_files(roster)

    def terminate_node(self, node_id: str) -> None:
        self.terminate_nodes([node_id])

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: Mapping[str, float],  # noqa: ARG002  `ray start` gets them through its environment
        labels: Mapping[str, str],  # noqa: ARG002
    ) -> dict[str, Any]:
        created: dict[str, Any] = self.create_node(node_config, tags, count)
        return created

    def _boots(self, node: Node) -> bool:
        """Whether the node still boots. After a reboot, which sets the clock to 0, it does not."""
        left = node.ready_at - time.monotonic()
        return bool(0 < left <= self._options.delay_s(node.type))

    def _new_node(self, tags: Mapping[str, str], machine: str = "") -> tuple[str, Node]:
        kind = tags[TAG_RAY_USER_NODE_TYPE]
        ready_at = time.monotonic() + self._options.delay_s(kind)
        return f"{kind}-{secrets.token_hex(4)}", Node(kind, dict(tags), machine, ready_at)

    def _keep_files(self, roster: Roster) -> None:
        """Note what is to be removed with the cluster."""
        roster.files = sorted({*roster.files, *self._files})

    @contextmanager
    def _while_present(self, node_id: str) -> Iterator[None]:
        if not self._file.directory.exists():
            raise ClusterError(f"node {node_id} is gone, with its cluster")
        with self._file.held() as roster:
            node = roster.nodes.get(node_id)
            if node is None or node.ending:
                raise ClusterError(f"node {node_id} is gone")
            yield


def is_head(node: Node) -> bool:
    """Whether the node is the head."""
    return bool(node.tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD)


def refuse(category: str, message: str) -> None:
    """Report a launch that failed as Ray's own providers do."""
    raise NodeLaunchException(category, message, None)
