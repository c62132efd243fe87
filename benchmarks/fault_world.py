"""The cluster that the fault machine owns, and what can be seen of it from outside: Ray's tables and /proc."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
MARK = "RM_FAULTS_RUN"
"""Inherited by every process of this run: nothing else is ever killed."""
GPUS = 8
NODE = {
    "num_cpus": 4,
    "num_gpus": GPUS,
    "object_store_memory": 100 * 2**20,
    "include_dashboard": False,
    "include_log_monitor": False,
    "no_monitor": True,
}


class World:
    """A Ray of `nodes` × 8 logical GPUs with an allocator, all below `home`. Close it with `close()`."""

    def __init__(self, home: Path, nodes: int) -> None:
        os.environ |= {
            MARK: f"{os.getpid()}-{int(time.time())}",
            "RAY_TMPDIR": str(home),
            "RAY_AUTH_MODE": "disabled",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "REPORTER_UPDATE_INTERVAL_MS": "60000",
            "RM_CHECK": "1",
            "SPT_NOENV": "1",  # else Ray, renaming its workers, overwrites the environment that /proc shows
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        }
        import ray
        from ray.cluster_utils import Cluster

        import rm
        from rm.spec import Config

        self.home, self.size = home, nodes
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={**NODE, "_system_config": {"raylet_report_resources_period_milliseconds": 50}},
        )
        self.nodes = [self.cluster.add_node(**NODE) for _ in range(nodes - 1)]
        self.address: str = self.cluster.address
        config = Config(home=home / "rm", checkpoint_root=str(home / "checkpoints"), audit_every_s=5)
        self.client = rm.connect(self.address, config=config)
        self.own_node: str = ray.get_runtime_context().get_node_id()

    def close(self) -> None:
        import ray

        ray.shutdown()
        with suppress(Exception):
            self.cluster.shutdown()
        for pid in marked():
            kill(pid)

    def killable_nodes(self) -> list[Any]:
        """Nodes on which neither this process nor the allocator depends."""
        return [node for node in self.nodes if node.node_id != self.own_node]

    def kill_node(self, node: Any, *, whole: bool) -> None:
        """Kill the node's own processes, or its raylet alone: what the raylet had started must notice."""
        if whole:
            self.cluster.remove_node(node, allow_graceful=False)
        else:
            kill(node.all_processes["raylet"][0].process.pid)

    def replace(self, node: Any) -> None:
        """Put a new node in the place of one that was killed. Ray allows it in the main thread only."""
        if node in self.cluster.worker_nodes:
            self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)
        self.nodes.append(self.cluster.add_node(**NODE))


def group_table() -> list[dict[str, Any]]:
    """Groups named as ours that Ray has not removed: name, state, GPUs and id."""
    from ray.util.placement_group import placement_group_table

    return [
        {
            "name": entry["name"],
            "state": entry["state"],
            "gpus": sum(bundle.get("GPU", 0) for bundle in entry["bundles"].values()),
            "id": entry["placement_group_id"],
        }
        for entry in placement_group_table().values()
        if entry["name"].startswith("rm/") and entry["state"] != "REMOVED"
    ]


def group_handle(group_id: str) -> Any:
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    return PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))


def actor_pids() -> dict[str, int]:
    """Live actors by name, from the GCS's own table."""
    from ray._private.state import actors

    return {each["Name"]: each["Pid"] for each in actors().values() if each["State"] == "ALIVE"}


def marked() -> dict[int, dict[str, str]]:
    """The living processes of this run, except this one: pid → environment."""
    found = {}
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            alive = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            continue
        environ = dict(word.split("=", 1) for word in words if "=" in word)
        if alive and pid != os.getpid() and environ.get(MARK) == os.environ[MARK]:
            found[pid] = environ
    return found


def user_processes() -> dict[int, dict[str, str]]:
    """Those that belong to an attempt."""
    return {pid: environ for pid, environ in marked().items() if "RM_ATTEMPT_KEY" in environ}


def leaders(job_id: str) -> list[int]:
    """The rank processes of a job: each leads a session."""
    found = []
    for pid, environ in user_processes().items():
        with suppress(OSError):
            if environ.get("RM_JOB_ID") == job_id and "RANK" in environ and os.getsid(pid) == pid:
                found.append(pid)
    return found


def kill(pid: int) -> bool:
    """SIGKILL. Whether there was somebody."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def until(condition: Callable[[], Any], timeout_s: float) -> bool:
    """Whether `condition` came true in time. What raises on the way is not true yet."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(Exception):
            if condition():
                return True
        time.sleep(0.1)
    return False
