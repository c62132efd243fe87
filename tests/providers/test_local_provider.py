"""The local provider as Ray's autoscaler and `ray up` use it, without a Ray: nodes, refusals, commands, the end.

Marked because it imports Ray's autoscaler: tests of processes must not have Ray in theirs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import yaml
from probes import wait_until

from rm.errors import ClusterError, InvalidSpec

pytestmark = [pytest.mark.own_ray]

REPO = Path(__file__).resolve().parents[2]
TYPE, KIND = "ray-user-node-type", "ray-node-type"
HEAD, WORKER = {TYPE: "head", KIND: "head"}, {TYPE: "gpu4", KIND: "worker"}


@pytest.fixture
def base() -> Iterator[Path]:
    """A short directory, because of the names of sockets; not there yet."""
    path = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))
    path.rmdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


def provider(base: Path, name: str = "c", **options: Any) -> Any:
    from rm.providers.local import LocalNodeProvider

    return LocalNodeProvider({"type": "external", "module": "m", "directory": str(base), **options}, name)


def runner(nodes: Any, node: str) -> Any:
    return nodes.get_command_runner("", node, {}, "c", subprocess, False)


def test_nodes_are_found_again_by_another_process(base: Path) -> None:
    first = provider(base)
    (head,) = first.create_node({}, HEAD, 1)
    workers = set(first.create_node_with_resources_and_labels({}, WORKER, 2, {}, {}))
    second = provider(base)
    assert set(second.non_terminated_nodes({})) == {head, *workers}
    assert second.non_terminated_nodes({KIND: "head"}) == [head]
    assert set(second.non_terminated_nodes({KIND: "worker"})) == workers
    second.set_node_tags(head, {"x": "y"})
    assert first.node_tags(head) == {**HEAD, "x": "y"}
    assert first.is_running(head)
    assert not first.is_terminated(head)
    first.cleanup_cluster_resources()
    assert not base.exists()


def test_two_clusters_do_not_mix(base: Path) -> None:
    one, other = provider(base, "one"), provider(base, "other")
    for each in (one, other):
        (head,) = each.create_node({}, HEAD, 1)
        runner(each, head).run("sleep 60 &")
    ports = [each._file.read().ports for each in (one, other)]
    assert not set(ports[0].values()) & set(ports[1].values())
    ours, theirs = one.non_terminated_nodes({}), other.non_terminated_nodes({})
    one.terminate_nodes(theirs)
    assert other.non_terminated_nodes({}) == theirs
    one.terminate_nodes(ours)
    one.cleanup_cluster_resources()
    from rm.providers.surroundings import NODE
    from rm.runtime.local_processes import members

    assert {each.name() for each in members(str(base / "other"), NODE)} == {"sleep"}
    other.cleanup_cluster_resources()
    assert not members(str(base), NODE)
    assert not base.exists()


def test_what_a_node_started_ends_with_it_and_its_neighbours_live(base: Path) -> None:
    nodes = provider(base)
    pids = {}
    for node in nodes.create_node({}, WORKER, 2):
        pids[node] = int(runner(nodes, node).run("sleep 60 >/dev/null & echo $!", with_output=True))
    gone, kept = pids
    nodes.terminate_node(gone)
    wait_until(
        lambda: not psutil.pid_exists(pids[gone]) or psutil.Process(pids[gone]).status() == "zombie", 5
    )
    assert psutil.pid_exists(pids[kept])
    assert nodes.non_terminated_nodes({}) == [kept]
    assert not (base / "c" / gone).exists()
    with pytest.raises(ClusterError, match="is gone"):
        runner(nodes, gone).run("true")
    nodes.cleanup_cluster_resources()


def test_with_the_head_go_all(base: Path) -> None:
    nodes = provider(base)
    (head,) = nodes.create_node({}, HEAD, 1)
    nodes.create_node({}, WORKER, 2)
    nodes.terminate_node(head)
    assert nodes.non_terminated_nodes({}) == []
    nodes.cleanup_cluster_resources()


def test_a_node_that_is_being_ended_starts_nothing_more(base: Path) -> None:
    nodes = provider(base)
    (node,) = nodes.create_node({}, WORKER, 1)
    with nodes._file.changing() as roster:
        roster.nodes[node].ending = True
    assert nodes.is_terminated(node)
    assert not nodes.is_running(node)
    assert nodes.non_terminated_nodes({}) == [node], "what ends is there until it has ended"
    with pytest.raises(ClusterError, match="is gone"):
        runner(nodes, node).run("true")
    nodes.cleanup_cluster_resources()


def test_a_launch_that_fails_is_reported_as_by_a_cloud(base: Path) -> None:
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    failing = {"gpu8": {"category": "NoStock", "message": "none left", "times": 1}}
    nodes = provider(base, capacity={"gpu4": 1}, fail_types=failing)
    with pytest.raises(NodeLaunchException, match="2 asked for, 0 of 1") as caught:
        nodes.create_node({}, WORKER, 2)
    assert caught.value.category == "NoCapacity"
    with pytest.raises(NodeLaunchException, match="none left") as caught:
        nodes.create_node({}, {**WORKER, TYPE: "gpu8"}, 1)
    assert caught.value.category == "NoStock"
    assert nodes.non_terminated_nodes({}) == []
    nodes = provider(base, capacity={"gpu4": 1}, fail_types=failing)
    assert len(nodes.create_node({}, {**WORKER, TYPE: "gpu8"}, 1)) == 1, "the restarted provider remembers"
    nodes.create_node({}, WORKER, 1)
    nodes.cleanup_cluster_resources()


def test_a_node_boots(base: Path) -> None:
    nodes = provider(base, boot_delay_s={"gpu4": 600})
    (node,) = nodes.create_node({}, WORKER, 1)
    assert nodes.non_terminated_nodes({}) == [node]
    assert not nodes.is_running(node)
    with pytest.raises(ClusterError, match="boots"):
        runner(nodes, node).run("uptime")
    with nodes._file.changing() as roster:
        roster.nodes[node].ready_at -= 600
    assert nodes.is_running(node)
    assert runner(nodes, node).run("uptime") == ""
    nodes.cleanup_cluster_resources()


def test_commands_get_their_environment_and_say_when_they_fail(base: Path) -> None:
    nodes = provider(base)
    (node,) = nodes.create_node({}, HEAD, 1)
    run = runner(nodes, node).run
    given = {"RAY_OVERRIDE_RESOURCES": {"GPU": 4}, "N": 0}
    said = run("echo $RAY_OVERRIDE_RESOURCES $N $RM_NODE $PWD", with_output=True, environment_variables=given)
    here = str(base / "c" / node)
    assert said.split() == ['{"GPU":4}', "0", here, here]
    with pytest.raises(click.ClickException, match=f"{node}, exit code 3"):
        run("exit 3")
    with pytest.raises(click.ClickException, match="ray down"):
        run("true", shutdown_after_run=True)
    nodes.cleanup_cluster_resources()


def test_ray_stop_ends_this_node_only(base: Path) -> None:
    nodes = provider(base)
    pids = {}
    for node in nodes.create_node({}, WORKER, 2):
        pids[node] = int(runner(nodes, node).run("sleep 60 >/dev/null & echo $!", with_output=True))
    gone, kept = pids
    assert runner(nodes, gone).run("ray stop && echo still here", with_output=True) == "still here\n"
    assert psutil.pid_exists(pids[kept])
    assert not psutil.pid_exists(pids[gone]) or psutil.Process(pids[gone]).status() == "zombie"
    assert set(nodes.non_terminated_nodes({})) == {gone, kept}, "the machine is still there"
    nodes.cleanup_cluster_resources()


def test_rays_own_files_go_to_the_node_and_others_where_they_should(base: Path, tmp_path: Path) -> None:
    nodes = provider(base)
    (node,) = nodes.create_node({}, HEAD, 1)
    source = tmp_path / "config"
    source.write_text("x")
    runner(nodes, node).run_rsync_up(str(source), "~/ray_bootstrap_config.yaml", {})
    assert (base / "c" / node / "ray_bootstrap_config.yaml").read_text() == "x"
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "f").write_text("y")
    runner(nodes, node).run_rsync_up(f"{tmp_path}/from/", f"{tmp_path}/to/", {})
    assert (tmp_path / "to" / "f").read_text() == "y"
    runner(nodes, node).run_rsync_up(str(source), str(source), {})
    nodes.cleanup_cluster_resources()


def test_a_directory_that_others_can_write_is_refused(base: Path) -> None:
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(ClusterError, match="provider.directory"):
        provider(base).create_node({}, HEAD, 1)


def test_rays_copy_of_the_configuration_goes_too(base: Path, tmp_path: Path) -> None:
    caches = [tmp_path / "ray-config-1", tmp_path / "ray-config-2"]
    for cache in caches:
        cache.write_text("{}")
    provider(base, _config_cache_path=str(caches[0])).create_node({}, HEAD, 1)
    provider(base, _config_cache_path=str(caches[1])).cleanup_cluster_resources()
    assert not any(cache.exists() for cache in caches)
    provider(base).cleanup_cluster_resources()
    assert not base.exists()


@pytest.mark.parametrize("name", ["x" * 60, "../up", ""])
def test_a_bad_cluster_name_is_refused(base: Path, name: str) -> None:
    with pytest.raises(InvalidSpec, match="cluster_name"):
        provider(base, name)


@pytest.mark.parametrize("file", ["cluster.local.yaml", "cluster.onprem.yaml"])
def test_the_yaml_is_what_ray_and_the_provider_take(file: str) -> None:
    from ray.autoscaler._private.providers import _get_node_provider_cls
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((REPO / file).read_text()))
    validate_config(config)
    ready = _get_node_provider_cls(config["provider"]).bootstrap_config(config)
    validate_config(ready)
    # Every key that Ray reads without a default must be there: it has none for an external provider.
    for key in ("auth", "docker", "file_mounts", "initialization_commands", "rsync_exclude", "rsync_filter"):
        assert key in ready
    gpus = {name: each["resources"]["GPU"] for name, each in ready["available_node_types"].items()}
    assert gpus.pop("head") == 0
    assert all(gpus.values())
    for name in gpus:
        assert ready["available_node_types"][name]["labels"]["ray.io/accelerator-type"]
        assert ready["available_node_types"][name].get("min_workers", 0) == 0


def test_the_hook_keeps_a_node_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.parameter import RayParams

    from rm.providers.loopback import share_machine
    from rm.providers.surroundings import SEVERAL_NODES

    monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", "gpu4-1")
    monkeypatch.setenv(SEVERAL_NODES, "1")
    monkeypatch.setenv("RM_NODE_DIR", "/tmp/c/gpu4-1")
    params = RayParams(min_worker_port=10002, max_worker_port=19999, dashboard_agent_listen_port=52365)
    share_machine(params, False)
    assert (params.node_ip_address, params.node_name) == ("127.0.0.1", "gpu4-1")
    assert (params.min_worker_port, params.max_worker_port, params.dashboard_agent_listen_port) == (0, 0, 0)
    assert params.runtime_env_dir_name.endswith("-gpu4-1")
    sockets = params.plasma_store_socket_name, params.raylet_socket_name
    assert all(each.startswith("/tmp/c/gpu4-1/") for each in sockets), (
        "two nodes that start at once would get one name"
    )
    assert len(set(sockets)) == 2
    assert os.environ[SEVERAL_NODES] == "0"
