"""`ray up -y cluster.local.yaml`: Ray's autoscaler grows and shrinks the cluster, and `ray down` leaves nothing."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from typing import Any

import pytest
from local_cluster import DRIVER, LocalCluster, local_cluster
from local_cluster import drive as run_driver
from probes import wait_until

pytestmark = [pytest.mark.own_ray, pytest.mark.timeout(400), pytest.mark.xdist_group("local_cluster")]


def drive(cluster: LocalCluster, code: str, **environment: str) -> Any:
    return run_driver(cluster.address, code, {**cluster.environment, **environment})


@pytest.mark.long
def test_a_waiting_group_brings_a_node_that_goes_again_and_nothing_is_left() -> None:
    with local_cluster(small=True) as cluster:
        cluster.up()
        grown = drive(
            cluster,
            """
            group = placement_group([{"GPU": 2}])
            ray.get(group.ready(), timeout=60)
            print(json.dumps(nodes()))
            """,
        )
        ((name, found),) = [each for each in grown.items() if not each[0].startswith("head-")]
        assert name.startswith("gpu4-")
        assert found == [4, "A100"]
        # The group went with its driver.
        wait_until(lambda: len(cluster.provider.non_terminated_nodes({})) == 1, 60, "the idle node has gone")
        cluster.down()
        assert cluster.left() == []


@pytest.mark.long
def test_it_grows_by_the_node_type_that_fits() -> None:
    with local_cluster(small=True) as cluster:
        cluster.up()
        grown = drive(
            cluster,
            """
            seen = []
            for bundles in ([{"GPU": 2}], [{"GPU": 8}], [{"GPU": 8}, {"GPU": 8}]):
                group = placement_group(bundles, strategy="STRICT_SPREAD")
                ray.get(group.ready(), timeout=90)
                seen.append(sorted(gpus for gpus, _ in nodes().values() if gpus))
                remove_placement_group(group)
                alone()
            print(json.dumps(seen))
            """,
        )
        assert grown == [[4], [8], [8, 8]]
        cluster.down()
        assert cluster.left() == []


@pytest.mark.long
def test_launches_that_fail_are_seen_and_tried_again() -> None:
    failing = {"gpu4": {"category": "NoStock", "message": "none left", "times": 2}}
    with local_cluster(
        small=True, capacity={"gpu8": 0}, fail_types=failing, boot_delay_s={"gpu4": 2}
    ) as cluster:
        cluster.up()
        failed, large = drive(
            cluster,
            """
            large, small = placement_group([{"GPU": 8}]), placement_group([{"GPU": 2}])
            ray.get(small.ready(), timeout=90)
            failed = [each.ray_node_type_name for each in get_cluster_status(address).failed_launches]
            print(json.dumps([failed, large.wait(0.1)]))
            """,
        )
        assert failed.count("gpu4") == 2
        assert "gpu8" in failed
        assert not large
        log = (cluster.base / "t/ray/session_latest/logs/monitor.log").read_text()
        assert re.search(r"NoStock.*none left", log)
        assert re.search(r"NoCapacity.*gpu8: 1 asked for, 0 of 0", log)
        cluster.down()
        assert cluster.left() == []


@pytest.mark.long
def test_two_clusters_share_a_machine_and_one_goes_without_the_other() -> None:
    with local_cluster("one", small=True) as one, local_cluster("two", small=True) as two:
        one.up()
        two.up()
        assert one.address != two.address
        for each in (one, two):
            drive(
                each,
                "ray.get(placement_group([{'GPU': 2}], lifetime='detached').ready(), timeout=60); print(1)",
            )
        before = two.processes()
        one.down()
        assert one.left() == []
        assert before <= two.processes()
        assert drive(two, "print(json.dumps(len(nodes())))") == 2
        two.down()
        assert two.left() == []


@pytest.mark.long
def test_a_crashed_head_starts_again_with_its_nodes_and_goes_completely() -> None:
    hold = "ray.get(placement_group([{'GPU': 2}], lifetime='detached').ready(), timeout=60); print(json.dumps(nodes()))"
    with local_cluster(small=True) as cluster:
        cluster.up()
        drive(cluster, hold)
        nodes = set(cluster.provider.non_terminated_nodes({}))
        crash(cluster)
        cluster.up()
        assert set(cluster.provider.non_terminated_nodes({})) & nodes, "the head is known still"
        assert len(drive(cluster, hold)) == 2
        crash(cluster)
        cluster.down()
        assert cluster.left() == []


def crash(cluster: LocalCluster) -> None:
    """Kill the Ray of the head, and its autoscaler."""
    (head,) = cluster.provider.non_terminated_nodes({"ray-node-type": "head"})
    for process in cluster.processes():
        words = " ".join(process.cmdline()) if process.is_running() else ""
        if process.environ().get("RM_NODE", "").endswith(head) and re.search(
            r"gcs_server|raylet|monitor\.py", words
        ):
            os.kill(process.pid, signal.SIGKILL)


@pytest.mark.long
def test_token_authentication_reaches_every_node() -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with local_cluster() as cluster:
        cluster.up(**token)
        assert drive(
            cluster, "ray.get(placement_group([{'GPU': 2}]).ready(), timeout=60); print(len(nodes()))", **token
        ) == 2  # fmt: skip
        refused = subprocess.run(
            [sys.executable, "-c", DRIVER, cluster.address],
            env={**cluster.environment, **token, "RAY_AUTH_TOKEN": "another"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "AuthenticationFailed" in refused.stderr
        cluster.ray("job", "submit", "--address", cluster.dashboard, "--", "rmctl", "nodes", **token)
        cluster.down(**token)
        assert cluster.left() == []


@pytest.mark.long
@pytest.mark.torch
def test_a_job_brings_its_node_trains_and_nothing_is_left() -> None:
    """From no GPU node at all: a job asks, a node comes, the training runs, the node goes, the cluster goes."""
    pytest.importorskip("torch")
    from local_cluster import REPO

    with local_cluster() as cluster:
        cluster.up()
        assert cluster.provider.non_terminated_nodes({"ray-node-type": "worker"}) == []
        said = cluster.ray(
            "job", "submit", "--address", cluster.dashboard, "--working-dir", str(REPO), "--",
            "python", "jobs/train_digits.py", "--num-gpus", "4", timeout_s=300,
        )  # fmt: skip
        assert "succeeded" in said
        wait_until(lambda: len(cluster.provider.non_terminated_nodes({})) == 1, 90, "the idle node has gone")
        cluster.down()
        assert cluster.left() == []
