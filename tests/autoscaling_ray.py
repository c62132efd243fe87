"""A Ray whose autoscaler is the real one and whose nodes are processes of this machine. Run as a program.

    python autoscaling_ray.py DIRECTORY '{"types": {…}, "idle_minutes": 0.1}'

Prints the address of the GCS when the head is up, and ends everything when its stdin is closed. A node type whose
`node_config` has `fails: TEXT` can't be launched: the provider raises that. With `comes_with: {GPU: 1}` its nodes have
that instead of what it declares.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

HEAD = "f" * 51 + "00000"
EMPTY = {
    "auth": {}, "docker": {}, "initialization_commands": [], "setup_commands": [], "head_setup_commands": [],
    "worker_setup_commands": [], "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts": {},
    "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
    "head_node": {}, "worker_nodes": {},
}  # fmt: skip
"""What an external provider gets no defaults for."""


def main(directory: Path, order: dict[str, object]) -> None:
    from rm.runtime.local_processes import end, environment, free_port

    key = f"autoscaling-{os.getpid()}"
    os.environ.update(environment(key))
    os.environ.update({
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    })  # fmt: skip
    del os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
    import ray._private.services
    from ray.cluster_utils import Cluster

    port = free_port()
    address = f"{ray._private.services.get_node_ip_address()}:{port}"
    head = {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0}
    config = {
        **EMPTY,
        "cluster_name": key,
        "max_workers": order.get("max_workers", 8),
        "idle_timeout_minutes": order["idle_minutes"],
        "upscaling_speed": 100,
        "provider": {
            "type": "external", "module": "autoscaling_provider.Provider", "launch_multiple": True,
            "head_node_id": HEAD, "gcs_address": address,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {**order["types"], "ray.head.default": head},  # type: ignore[dict-item]
    }  # fmt: skip
    path = directory / "autoscaling.json"
    path.write_text(json.dumps(config))
    os.environ["RAY_TMPDIR"] = str(directory)
    try:
        cluster = Cluster(shutdown_at_exit=True)
        cluster.add_node(
            num_cpus=4, num_gpus=0, object_store_memory=10**8, include_dashboard=False, dashboard_port=free_port(),
            gcs_server_port=port, autoscaling_config=str(path), include_log_monitor=False,
        )  # fmt: skip
        assert cluster.address == address
        print(address, flush=True)
        sys.stdin.read()
    finally:
        end(key)
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
