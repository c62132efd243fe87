"""One Ray cluster for all tests that need Ray: three nodes of 8 logical GPUs, one allocator, one ledger.

Every test on it starts and ends with nothing charged, no group and no user process: `cluster` checks both.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from probes import MARK, assert_nothing_left, groups, wait_until

REPO = Path(__file__).resolve().parent.parent
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
"""As in a user's shell with the environment activated: `python` is ours."""
os.environ[MARK] = f"{os.getpid()}"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ["RUNTIME_ENV_RETRY_TIMES"] = "1"
"""Ray retries a failing pip install three times with pauses; one try is enough to see it fail."""
os.environ["REPORTER_UPDATE_INTERVAL_MS"] = "60000"
"""Ray's agent on each node measures all processes every 5 s, which costs more than most tests."""
os.environ["RM_CHECK"] = "1"
"""The allocator under test checks its state after every batch."""
JOBS_TOLD = 20
"""Jobs of which the report of a failed test tells."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails on the shared cluster tells what its jobs went through, while the ledger is still there."""
    report = yield
    client = getattr(item, "funcargs", {}).get("client")
    if report.when == "call" and report.failed and client is not None:
        with contextlib.suppress(Exception):
            report.sections.append(("ledger", _story(client)))
    return report


def _story(client: Any) -> str:
    """Nodes and queues, the newest jobs with what they wait for, and their events."""
    jobs = client.jobs(all=True, limit=JOBS_TOLD)
    lines = [str(each) for each in (*client.nodes(), *client.queues(), client.audit(look=False))]
    lines += [f"{job.id} {job.last.status} on {job.last.stand!r}: {job.why()}" for job in jobs]
    events = sorted((event for job in jobs for event in job.events()), key=lambda event: event.seq)
    lines += [f"{event.at:.3f} {event.job_id} {event.kind} {event.body}" for event in events]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def ray_place() -> Iterator[Path]:
    """Where this process's Ray has its sessions, each with its packages: Ray itself never removes them."""
    # A longer name would leave none for sockets.
    short = tempfile.TemporaryDirectory(prefix="rm-t-", dir="/tmp", ignore_cleanup_errors=True)
    with short as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", place)
        yield Path(place)


@pytest.fixture(scope="session")
def ray_cluster(ray_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
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
        # Nobody reads drivers' logs here, and nothing grows: two processes less on each node.
        "include_log_monitor": False,
        "no_monitor": True,
    }
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**node, "_system_config": {"raylet_report_resources_period_milliseconds": 50}},
    )
    nodes = [cluster.head_node]
    for kind in ("A100", "H100"):
        nodes.append(cluster.add_node(**node, labels={"ray.io/accelerator-type": kind}))
    config = Config(
        home=home,
        checkpoint_root=str(home / "checkpoints"),
        audit_every_s=5,
        max_pending_per_owner=2_500,
        max_log_bytes=100 * 2**20,
    )
    client = rm.connect(cluster.address, config=config)
    try:
        yield SimpleNamespace(
            cluster=cluster,
            client=client,
            home=home,
            config=config,
            address=cluster.address,
            nodes=nodes,
            max_log_bytes=config.max_log_bytes,
        )
        wait_until(lambda: not groups(), 30, "what was kept warm is gone")
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
        # Tests kill runners: what counts against a node ends with the test.
        client.uncordon(*(node.id for node in client.nodes()))
    finally:
        assert_nothing_left(client)


@pytest.fixture(scope="session")
def postgres_url_of_the_day() -> Iterator[str]:
    """A database of a real PostgreSQL server that this run starts; "" where no server is installed."""
    sys.path.insert(0, str(REPO / "tests" / "ledger"))
    from ledger_server import Server, find_binaries

    binaries = find_binaries()
    if binaries is None:
        yield ""
        return
    server = Server(binaries)
    try:
        server.start()
        yield server.url(server.database())
    finally:
        server.stop()
