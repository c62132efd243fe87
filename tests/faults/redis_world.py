"""A Ray whose GCS keeps its tables in a Redis of the tests' own, so that the GCS can die and come back.

head: raylet, GCS, allocator, store; no GPUs          worker: raylet, 4 GPUs, the jobs
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from probes import wait_until

REDIS = shutil.which("redis-server")
WHY_NOT = (
    "no redis-server here (Debian: apt-get install redis-server): Ray can't bring a GCS back without one"
)
GPUS = 4
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
NODE: dict[str, Any] = {
    "num_cpus": 4,
    "object_store_memory": 100 * 2**20,
    "include_dashboard": False,
    "include_log_monitor": False,
    "no_monitor": True,
}


class RedisWorld:
    """The cluster, and a client of the allocator on it. One per process: Ray allows no second."""

    def __init__(self, home: Path, redis_port: int | None) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._ray = ray
        self.home = home
        if redis_port is not None:
            os.environ["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{redis_port}"
        self.head = {
            **NODE,
            "num_gpus": 0,
            "gcs_server_port": free_port(),
            "_system_config": {"raylet_report_resources_period_milliseconds": 50},
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=self.head)
        self.worker = self.cluster.add_node(**NODE, num_gpus=GPUS)
        self.connect()

    def connect(self) -> None:
        import rm
        from rm.spec import Config

        config = Config(home=self.home, checkpoint_root=str(self.home / "checkpoints"), audit_every_s=1)
        self.address = str(self.cluster.address)  # the cluster can't tell it while its GCS is away
        self.client = rm.connect(self.address, config=config)

    def kill_gcs(self) -> None:
        self.cluster.head_node.kill_gcs_server()

    def start_gcs(self) -> None:
        self.cluster.head_node.start_gcs_server()

    def kill_head(self) -> None:
        """All of the head's processes, as if its machine had lost its power: GCS, raylet, allocator, store."""
        self._ray.shutdown()
        self.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    def start_head(self) -> None:
        """A head at the old one's address. Without Redis it knows nothing of the old one."""
        self.cluster.head_node = None
        self.cluster.add_node(**self.head)

    def close(self) -> None:
        if self.cluster.head_node.all_processes.get("gcs_server") is None:
            self.start_gcs()  # a story that broke off: without a GCS Ray takes a minute to leave
        self._ray.shutdown()
        self.cluster.shutdown()


class Readings(threading.Thread):
    """Reads the nodes as fast as it can, as the allocator does. What it must never see stands in `wrong`."""

    def __init__(self, groups: dict[str, set[str]]) -> None:
        super().__init__(daemon=True)
        self._groups = groups
        """By id of a group that lives all the while: its nodes."""
        self._over = threading.Event()
        self.wrong: list[str] = []
        self._heard_at = 0.0

    def run(self) -> None:
        from rm.runtime.nodes import read_nodes

        seen, began = read_nodes(), time.monotonic()
        while not self._over.is_set():
            now = read_nodes(seen)
            if not now.unheard:
                self._heard_at = now.at
            self.wrong += [
                f"{now.at - began:.3f} s: node {each} is gone" for each in seen.nodes if now.gone(each)
            ]
            for group_id, nodes in self._groups.items():
                lacking = [each for each in nodes if now.lacks(group_id, each)]
                self.wrong += [f"{now.at - began:.3f} s: {each} lacks {group_id}" for each in lacking]
            seen = now
            time.sleep(0.002)

    def all_heard_since(self, at: float) -> bool:
        """Whether a reading that began after this moment of the monotonic clock shows that every node has reported."""
        return self._heard_at > at

    def __enter__(self) -> Self:
        from rm.runtime.nodes import read_nodes

        def reported() -> bool:
            now = read_nodes()
            return all(
                now.holds(group_id, each) for group_id, nodes in self._groups.items() for each in nodes
            )

        # A group counts as made when the GCS has committed it; its nodes' own report comes up to a period later.
        wait_until(reported, 10, "the groups stand in their nodes' reports")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(90)  # before anybody leaves Ray: it would connect again


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[int]:
    """A Redis server on loopback, in memory; its port. It ends with the block, or with its parent."""
    assert REDIS is not None
    port = free_port()
    options = {"port": port, "bind": "127.0.0.1", "dir": directory, "save": "", "appendonly": "no"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with (directory / "redis.log").open("wb") as log:
        server = subprocess.Popen(
            [REDIS, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,  # Ray ends a story's process by itself when its GCS stays away
        )
    try:
        wait_until(lambda: listens(port), 20, "redis-server answers")
        yield port
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def world(directory: Path) -> Iterator[RedisWorld]:
    with redis(directory) as port:
        made = RedisWorld(directory / "home", port)
        try:
            yield made
        finally:
            made.close()


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
