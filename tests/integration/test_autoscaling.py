"""The real autoscaler: jobs that nothing could hold bring nodes up, exactly as many as they need, and let them go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from probes import actor_pids, groups, wait_until

from rm.errors import Infeasible

pytestmark = [pytest.mark.own_ray, pytest.mark.long]

TYPES = {
    "h2": {
        "resources": {"CPU": 4, "GPU": 2},
        "labels": {"ray.io/accelerator-type": "H100"},
        "node_config": {"fails": "InsufficientInstanceCapacity: no h2 in this zone"},
        "min_workers": 0,
        "max_workers": 2,
    },
    "a4": {
        "resources": {"CPU": 4, "GPU": 4},
        "labels": {"ray.io/accelerator-type": "A100"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 3,
    },
}


SMALL = {
    "t2": {
        "resources": {"CPU": 4, "GPU": 2},
        "node_config": {"comes_with": {"GPU": 1}},
        "min_workers": 0,
        "max_workers": 3,
    },
}


TWO = {"a4": {**TYPES["a4"], "max_workers": 2}}
IDLE_S = 9.0


@pytest.fixture
def autoscaling(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    import ray

    import rm
    from rm.spec import Config

    with tempfile.TemporaryDirectory(prefix="rm-as-", dir="/tmp") as directory:
        ray.shutdown()
        program = Path(__file__).parents[1] / "autoscaling_ray.py"
        order = json.dumps({"types": getattr(request, "param", TYPES), "idle_minutes": IDLE_S / 60})
        with (Path(directory) / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(program), directory, order],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            address = process.stdout.readline().strip()
            assert address, (Path(directory) / "log").read_text()[-2000:]
            home = Path(directory) / "home"
            config = Config(home=home, autoscaling_config=Path(directory) / "autoscaling.json")
            client = rm.connect(address, config=config)
            wait_until(lambda: _knows_types(client), 30, "the autoscaler has published its node types")
            yield SimpleNamespace(client=client, address=address)
        finally:
            ray.shutdown()
            process.stdin.close()
            process.wait(120)
            process.stdout.close()


def _knows_types(client) -> bool:
    try:
        client.submit("true", num_gpus=1, hold=True).cancel()
    except Infeasible:
        return False
    return True


def most_nodes(seen: list[int], client) -> int:
    seen.append(sum(1 for node in client.nodes() if node.gpus))
    return max(seen)


def test_jobs_bring_nodes_up_and_nodes_go_when_nobody_needs_them(autoscaling: SimpleNamespace) -> None:
    client, seen = autoscaling.client, []
    assert sum(node.gpus for node in client.nodes()) == 0
    jobs = [client.submit("sleep 12", num_gpus=1) for _ in range(6)]
    wait_until(lambda: jobs[0].why()["code"] == "NodeBooting", 10, "nodes are asked for")
    start = jobs[0].why()["start"]
    assert start["new_nodes"] in [("h2",), ("a4",)]
    assert start["wait_s"] is None, "nothing that is up could ever hold it"
    assert 0 < start["p50_s"] <= 240
    wait_until(lambda: booting(client), 30, "a node boots")

    def done() -> bool:
        most_nodes(seen, client)
        return all(job.status == "SUCCEEDED" for job in jobs)

    wait_until(done, 90, "six jobs of one GPU ran")
    assert max(seen) == 2, "on two nodes of four"
    gang = client.submit("sleep 1", nodes=3, gpus_per_node=4)
    wait_until(lambda: most_nodes(seen, client) and gang.status == "SUCCEEDED", 90, "the gang ran on three")
    assert max(seen) == 3
    wait_until(lambda: not sum(node.gpus for node in client.nodes()), 90, "the nodes are gone again")
    assert groups() == []


def booting(client) -> list[str]:
    return [each.name for each in client.nodes(booting=True) if each.booting_since is not None and each.jobs]


@pytest.mark.parametrize("autoscaling", [TWO], indirect=True)
def test_a_node_that_is_kept_for_a_gang_stays_though_it_is_idle_and_goes_when_the_gang_has_gone(
    autoscaling: SimpleNamespace,
) -> None:
    client = autoscaling.client
    long, short = client.submit("sleep 1000", num_gpus=4), client.submit("sleep 1", num_gpus=4)
    wait_until(lambda: short.status == "SUCCEEDED" and long.status == "RUNNING", 90, "both nodes came")
    gang = client.submit("true", nodes=2, gpus_per_node=4)
    wait_until(lambda: stays(), 20, "the idle node is to stay")
    assert len(stays()) == 1, "the other one has a job"
    (idle,) = [node.id for node in client.nodes() if node.idle_since is not None]

    def idle_s() -> float:
        (node,) = [node for node in client.nodes() if node.id == idle]
        assert node.idle_since is not None
        return time.time() - node.idle_since

    wait_until(lambda: idle_s() > 3 * IDLE_S, 4 * IDLE_S, "it is idle for longer than any node may be")
    assert gang.why()["code"] == "WaitingForCapacity"
    audit = client.audit()
    assert not audit.findings, "the audit knows what keeps the node"
    before = stays()
    os.kill(actor_pids()["allocator"], signal.SIGKILL)
    wait_until(lambda: len(stays()) == 1 and stays() != before, 30, "the next allocator keeps it anew")
    assert idle in {node.id for node in client.nodes()}
    gang.cancel()
    wait_until(lambda: not stays(), 10, "nothing keeps it any longer")
    wait_until(lambda: idle not in {node.id for node in client.nodes()}, 60, "it has gone")
    long.cancel()
    wait_until(lambda: not sum(node.gpus for node in client.nodes()), 60, "so has the other")


def stays() -> list[str]:
    return [name for name in groups() if "/stay/" in name]


@pytest.mark.parametrize("autoscaling", [SMALL], indirect=True)
def test_a_type_whose_nodes_come_smaller_than_it_declares_is_left_alone(autoscaling: SimpleNamespace) -> None:
    client = autoscaling.client
    job = client.submit("true", num_gpus=2)
    wait_until(lambda: job.why()["code"] == "LaunchFailed", 60, "a node came")
    said = "a node of it came with 1 GPUs, and the type declares 2"
    assert client.scale()["types"]["t2"]["failed"]["message"] == said
    assert job.why()["message"] == f"a node of type t2 could not be had: {said}"
    wait_until(lambda: not groups(), 10, "nothing is asked for")
    wait_until(lambda: not sum(node.gpus for node in client.nodes()), 50, "what came goes away as idle")
    assert (job.why()["code"], groups()) == ("LaunchFailed", []), "nor is it asked for again"
    job.cancel()


def test_a_type_that_cannot_be_had_gives_way_to_the_next(autoscaling: SimpleNamespace) -> None:
    client = autoscaling.client
    only = client.submit("true", num_gpus=2, gpu_type="H100")
    wait_until(lambda: only.why()["code"] == "LaunchFailed", 60, "the launch failed")
    assert "no h2 in this zone" in only.why()["message"]
    assert "no h2 in this zone" in client.scale()["types"]["h2"]["failed"]["message"]
    either = client.submit("true", num_gpus=2, gpu_type="H100,A100")
    wait_until(lambda: either.status == "SUCCEEDED", 90, "it ran on the other type")
    only.cancel()
    wait_until(lambda: not client.jobs() and not groups(), 30, "nothing is asked for any more")
