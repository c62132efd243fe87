"""One Ray cluster for all tests that need Ray: three nodes of 8 logical GPUs, one allocator, one ledger.

Every test on it starts and ends with nothing charged, no group and no user process: `cluster` checks both.
"""

from __future__ import annotations

import os
import sys as _s

_s.path.insert(0, "/tmp/probe")
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
MARK = "RM_TEST_RUN"
"""Inherited by every process of this test run, so that leftovers can be told from strangers."""
os.environ[MARK] = f"{os.getpid()}"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ["RUNTIME_ENV_RETRY_TIMES"] = "0"
"""Ray retries a failing pip install three times with pauses; the tests need to see it fail once."""
os.environ["RM_CHECK"] = "1"
"""The allocator under test checks its state after every batch."""


def wait_until(condition: Callable[[], Any], timeout_s: float = 30.0, what: str = "") -> Any:
    """The first true value of `condition`. Fails the test, naming what was waited for, after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:g} s: {what or condition}")
        time.sleep(0.05)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The shared cluster and a client of its allocator."""
    import ray
    from ray.cluster_utils import Cluster

    import rm
    from rm.spec import Config

    home = tmp_path_factory.mktemp("rm-home")
    node = {
        "num_cpus": 4,
        "num_gpus": 8,
        "object_store_memory": 100 * 2**20,
        "include_dashboard": False,
    }
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**node, "_system_config": {"raylet_report_resources_period_milliseconds": 50}},
    )
    nodes = [cluster.head_node]
    for kind in ("A100", "H100"):
        nodes.append(cluster.add_node(**node, labels={"ray.io/accelerator-type": kind}))
    client = rm.connect(cluster.address, config=Config(home=home, checkpoint_root=str(home / "checkpoints")))
    try:
        yield SimpleNamespace(cluster=cluster, client=client, home=home, address=cluster.address, nodes=nodes)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def client(ray_cluster: SimpleNamespace) -> Iterator[Any]:
    """A client of the shared allocator. Fails the test that leaves anything behind."""
    client = ray_cluster.client
    yield client
    for job in client.jobs():
        job.cancel()
    try:
        wait_until(lambda: not client.jobs(), 60, "all jobs ended")
    finally:
        assert_nothing_left(client)


def assert_nothing_left(client: Any) -> None:
    """No GPU charged, no placement group of ours in Ray's table, no user process, no scratch directory."""
    from rm.runtime.workspace import scratch_root

    charged = {node.name: node.charged_gpus for node in client.nodes() if node.charged_gpus}
    assert not charged, f"charged: {charged}"
    assert groups() == [], "placement groups are left"
    wait_until(lambda: not user_processes(), 5, f"user processes gone, left: {user_processes()}")
    scratch = [p.name for p in scratch_root().iterdir()] if scratch_root().exists() else []
    mine = [name for name in scratch if name.startswith(client.hello()["ledger_key"])]
    assert not mine, f"scratch directories: {mine}"


def groups() -> list[str]:
    """The names of our placement groups that Ray's own table holds as not removed."""
    from ray.util.placement_group import placement_group_table

    return sorted(
        entry["name"]
        for entry in placement_group_table().values()
        if entry["name"].startswith("rm/") and entry["state"] != "REMOVED"
    )


def user_processes() -> dict[int, str]:
    """Processes of this test run that belong to an attempt: pid → command line."""
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{MARK}={os.environ[MARK]}".encode() not in environ:
            continue
        if any(each.startswith(b"RM_ATTEMPT_KEY=") for each in environ) and command:
            found[pid] = command
    return found
