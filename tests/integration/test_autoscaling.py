"""The real autoscaler: jobs that nothing could hold bring nodes up, exactly as many as they need, and let them go."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from probes import groups, wait_until

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


@pytest.fixture
def autoscaling() -> Iterator[SimpleNamespace]:
    import ray

    import rm
    from rm.spec import Config

    with tempfile.TemporaryDirectory(prefix="rm-as-", dir="/tmp") as directory:
        ray.shutdown()
        program = Path(__file__).parents[1] / "autoscaling_ray.py"
        order = json.dumps({"types": TYPES, "idle_minutes": 0.15})
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
            process.wait(60)
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
