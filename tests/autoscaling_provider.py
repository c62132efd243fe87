"""The node provider of `autoscaling_ray.py`: Ray's own fake one, with types that can't be launched or come smaller."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):  # type: ignore[misc]
    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: Any, count: int, resources: Any, labels: Any
    ) -> None:
        if node_config.get("fails"):
            raise RuntimeError(node_config["fails"])
        resources = {**resources, **node_config.get("comes_with", {})}
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
