"""What a command of a node finds around it, and what becomes of `ray stop`; without Ray, so that it can be tested so.

Every command of a node, and all that it starts, carries NODE: the node's mark, by which it is found again and ended
(`rm.runtime.local_processes`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from rm.runtime.local_processes import environment

NODE = "RM_NODE"
DIRECTORY = "RM_NODE_DIR"
START_HOOK = "RAY_START_HOOK"
SEVERAL_NODES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray takes a node on loopback for one of a system where it allows one node only; `ray start` is told otherwise."""
_NODES_OWN = ("RAY_OVERRIDE_", "RAY_CLOUD_INSTANCE_", "RAY_NODE_TYPE_", "RAY_HEAD_IP", "RAY_enable_autoscaler_v2",
              "CUDA_VISIBLE_DEVICES", "RM_HEAD_", "RM_DASHBOARD_PORT", "RM_CLIENT_PORT")  # fmt: skip
"""What a node must not inherit from whoever starts it: another node's resources, labels and identity."""
_RAY_STOP = re.compile(r"(?<![\w./-])ray\s+stop((?:\s+(?:--?[a-z][\w-]*|\d+))*)(?=\s*(?:$|[;&|)\n]))")


def without_ray_stop(command: str, instead: str) -> str:
    """The shell command with every `ray stop` replaced, its options included."""
    return _RAY_STOP.sub(lambda _: instead, command)


def node_environment(mark: str, cluster: Path, node: Path, ports: Mapping[str, int]) -> dict[str, str]:
    """The environment of a command on a node of this machine.

    `cluster` and `node`: their directories. All that Ray and jobs write without being told where goes below `cluster`
    and ends with it, the allocator's home included unless RM_HOME says otherwise.
    """
    inherited = {
        name: value for name, value in environment(mark, NODE).items() if not name.startswith(_NODES_OWN)
    }
    return {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",  # Ray's 5 s spare a cloud's API, which there is none of here
        "RM_HOME": str(cluster / "home"),
        **inherited,
        DIRECTORY: str(node),
        "RAY_TMPDIR": str(cluster),
        "TMPDIR": str(cluster / "tmp"),
        START_HOOK: "rm.providers.loopback.share_machine",
        SEVERAL_NODES: "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}",
        # In capitals: see rm.runtime.default_cluster.
        "RM_HEAD_ADDRESS": f"LOCALHOST:{ports.get('gcs', 0)}",
        "RM_HEAD_PORT": str(ports.get("gcs", 0)),
        "RM_DASHBOARD_PORT": str(ports.get("dashboard", 0)),
        "RM_CLIENT_PORT": str(ports.get("client", 0)),
    }
