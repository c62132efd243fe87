"""What a Ray node must do differently when it shares its machine with other nodes.

Ray calls `share_machine` at each `ray start` of such a node (RAY_START_HOOK), so that the commands in the YAML are
those of a cloud.
"""

from __future__ import annotations

import os
from typing import Any

from rm.providers.surroundings import DIRECTORY, SEVERAL_NODES

OBJECT_STORE_BYTES = 256 * 2**20
"""Ray's default is a third of the machine's memory, for each node."""


def share_machine(params: Any, head: bool) -> None:  # noqa: ARG001  what Ray calls a hook with
    """Listen on loopback alone, at ports, sockets and in a directory for runtime environments that no other node has.

    `params`: Ray's own `RayParams`. `ray start --node-ip-address=127.0.0.1` would not do: Ray replaces that by the
    machine's outward address.
    """
    # For what `ray start` leaves running. All that it does there, on Linux: drivers take 127.0.0.1 at its word.
    os.environ[SEVERAL_NODES] = "0"
    params.node_ip_address = "127.0.0.1"
    params.node_name = os.environ.get("RAY_CLOUD_INSTANCE_ID") or "127.0.0.1"
    # Each node's agent unpacks a job's working directory anew, in place of one that another node's jobs are in.
    params.runtime_env_dir_name = f"runtime_resources-{params.node_name}"
    # Ray looks for names that are free, and of nodes that start at one moment all but one would die of the name.
    place, pid = os.environ.get(DIRECTORY) or os.environ.get("RAY_TMPDIR", "/tmp"), os.getpid()
    params.plasma_store_socket_name, params.raylet_socket_name = (
        f"{place}/plasma-{pid}",
        f"{place}/raylet-{pid}",
    )
    params.min_worker_port = params.max_worker_port = 0
    params.dashboard_agent_listen_port = 0
    if params.object_store_memory is None:
        params.object_store_memory = OBJECT_STORE_BYTES
