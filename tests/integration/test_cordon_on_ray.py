"""Nodes out of service, on a real Ray: what runs there goes on elsewhere, and nothing new comes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from probes import actor_pids, runner_pid, wait_until

from rm.errors import UnknownNode

pytestmark = pytest.mark.ray


def the_node_of(client: Any, job: Any) -> Any:
    (node,) = [each for each in client.nodes() if job.id in each.jobs]
    return node


def status(client: Any, node_id: str) -> str:
    return next(each.status for each in client.nodes() if each.id == node_id)


def test_a_drained_job_goes_on_elsewhere_from_its_checkpoint(client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def work() -> str:
        import time

        import rm

        saved = rm.checkpoint_dir() / "saved"
        again = saved.exists()
        rm.report(step=1)
        while not gate.exists() and not rm.should_stop():
            time.sleep(0.05)
        saved.touch()
        return "went on" if again else "began"

    job = client.submit(work, num_gpus=8)
    wait_until(lambda: job.progress, 40, "it listens")
    node = the_node_of(client, job)
    (view,) = client.drain(node.id[:12], deadline="1s", reason="a fan is loud")
    assert (view.status, view.free_gpus) == ("draining", 0)
    assert (view.cordon["by"], view.cordon["reason"]) == (client.owner, "a fan is loud")
    assert view.cordon["deadline"] == pytest.approx(view.cordon["at"] + 1)
    wait_until(lambda: (job.view().status, job.last.attempts) == ("RUNNING", 2), 40, "it runs again")
    assert the_node_of(client, job).id != node.id
    assert status(client, node.id) == "drained"
    assert (job.last.evictions, job.last.failures, job.last.infra_failures) == (1, 0, 0)
    assert "is drained" in job.last.outcome["message"]
    stops = [each.body["cause"] for each in job.events() if each.kind == "StopRequested"]
    assert stops == ["drained"]
    os.kill(actor_pids()["allocator"], signal.SIGKILL)
    whole = client.submit("true", nodes=3, gpus_per_node=8)
    assert whole.why()["code"] == "NodesCordoned", "the drain outlives the allocator"
    gate.touch()
    assert job.result(60) == "went on"
    assert client.uncordon(node.id)[0].status == "ready"
    assert whole.wait(120).status == "SUCCEEDED"


def test_nothing_new_comes_to_a_cordoned_node_and_what_runs_goes_on(client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = client.submit(f"while [ ! -e {gate} ]; do sleep 0.05; done", num_gpus=1)
    wait_until(lambda: job.view().status == "RUNNING", 40, "it runs")
    node = the_node_of(client, job)
    client.cordon(node.id)
    other = client.submit("true", num_gpus=1)
    assert other.wait(120).status == "SUCCEEDED"
    placed = [each.body["placed"] for each in other.events() if each.kind == "JobAdmitted"]
    assert [each["node_id"] for each in placed[0]] != [node.id], "the fullest node would have been that one"
    assert (job.view().status, status(client, node.id)) == ("RUNNING", "cordoned")
    gate.touch()
    assert job.wait(120).status == "SUCCEEDED"


def test_a_node_that_loses_runners_of_several_jobs_is_cordoned(client) -> None:
    jobs = [client.submit("sleep 1000", num_gpus=1, gpu_type="A100") for _ in range(3)]
    for job in jobs:
        wait_until(lambda job=job: job.view().status == "RUNNING", 40, "it runs")
    node = the_node_of(client, jobs[0])
    for job in jobs:
        os.kill(runner_pid(client, job), signal.SIGKILL)
    wait_until(lambda: status(client, node.id) == "cordoned", 40, "it is cordoned")
    (cordon,) = [each.cordon for each in client.nodes() if each.id == node.id]
    assert cordon["by"] == "health"
    assert all(f"{job.id}.1 (a runner was lost" in cordon["reason"] for job in jobs)
    wait_until(lambda: all(job.view().status == "QUEUED" for job in jobs), 40, "all wait")
    wait_until(lambda: jobs[0].why()["code"] == "NodesCordoned", 20, "it says why")


@pytest.fixture
def leaving(ray_cluster: SimpleNamespace, client: Any) -> Iterator[str]:
    """The id of a fourth node that Ray drains, which the allocator has not been told. Other work keeps it alive."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.util.placement_group import placement_group, remove_placement_group

    node = ray_cluster.cluster.add_node(
        num_cpus=1, num_gpus=2, object_store_memory=100 * 2**20, include_dashboard=False, include_log_monitor=False,
        no_monitor=True,
    )  # fmt: skip
    other = placement_group([{"GPU": 1}], bundle_label_selector=[{"ray.io/node-id": node.node_id}])
    try:
        assert other.wait(120)
        wait_until(
            lambda: [each.foreign_gpus for each in client.nodes() if each.id == node.node_id] == [1],
            30,
            "it is seen, and what others hold there",
        )
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        until_ms = int((time.time() + 300) * 1000)
        assert GcsClient(address=ray_cluster.address).drain_node(node.node_id, reason, "spot", until_ms)[0]
        yield node.node_id
    finally:
        remove_placement_group(other)
        ray_cluster.cluster.remove_node(node)
        wait_until(lambda: len(client.nodes()) == 3, 30, "it is gone")


def test_a_job_planned_on_a_node_that_ray_takes_away_runs_elsewhere(client: Any, leaving: str) -> None:
    job = client.submit("true", num_gpus=1)
    assert job.wait(120).status == "SUCCEEDED"
    placed = [each.body["placed"][0]["node_id"] for each in job.events() if each.kind == "JobAdmitted"]
    assert placed[0] == leaving, "it was the fullest: the race was there"
    assert leaving not in placed[1:]
    assert len(placed) == 2, "Ray was asked, so that it was not planned there again"
    assert (job.last.attempts, job.last.failures, job.last.infra_failures) == (2, 0, 0)
    (node,) = [each for each in client.nodes() if each.id == leaving]
    assert (node.status, node.charged_gpus, node.jobs) == ("drained", 0, ())
    assert node.cordon["reason"] == "Ray takes the node away"


def test_a_node_that_is_not_there_is_named_with_those_that_are(client) -> None:
    nodes = client.nodes()
    with pytest.raises(UnknownNode, match="there is no node 'zebra'") as caught:
        client.cordon("zebra")
    assert all(node.id[:8] in caught.value.message for node in nodes)
    assert {node.status for node in nodes} == {"ready"}
