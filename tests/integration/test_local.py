"""Starting a Ray on this machine, and its end: no process, no directory, no file may be left, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from probes import PATIENCE

from rm.errors import ClusterError, InvalidSpec
from rm.runtime import local_launcher
from rm.runtime.default_cluster import become_default
from rm.runtime.local import LocalRay
from rm.runtime.local_processes import MARK, members

pytestmark = [pytest.mark.own_ray, pytest.mark.timeout(120)]


def python(code: str, **environment: str) -> list[str]:
    """The lines that `code` printed in a process with nothing of Ray's in its environment but what is given."""
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**_clean(), **environment},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout.splitlines()


def _clean() -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RUNTIME_ENV_"))
    }


def within(seconds: float, condition: Callable[[], Any]) -> float:
    """How long it took until `condition` held; fails after some times `seconds`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE * seconds
        time.sleep(0.05)
    return time.monotonic() - began


def is_gone(local: LocalRay) -> bool:
    return not members(local.key) and not Path(local.directory).exists()


def names(local: LocalRay) -> set[str]:
    return {process.info["name"] for process in members(local.key)}


def listening(local: LocalRay) -> set[str]:
    """The addresses at which any process of the cluster listens."""
    found = set()
    for process in members(local.key):
        found |= {
            each.laddr.ip for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN
        }
    return found


@pytest.mark.long
def test_a_cluster_of_two_nodes_is_as_ordered_and_ends_with_its_launcher() -> None:
    labels = [{}, {"ray.io/accelerator-type": "A100", "rack": "7"}]
    with LocalRay.start(num_gpus=2, num_cpus=1, nodes=2, labels=labels) as local:
        assert local.describe_gpus() == "no GPU found: 4 logical GPUs on 2 nodes, accounting only"
        assert not local.real_gpus
        assert listening(local) <= {"127.0.0.1", "::ffff:127.0.0.1"}
        with urllib.request.urlopen(f"{local.dashboard_url}/api/version", timeout=10) as answer:
            assert json.load(answer)["ray_version"]
        (nodes,) = python(
            f"import json, ray; from rm.runtime.attach import attach; attach({local.address!r})\n"
            "print(json.dumps([[node['Resources'], node['Labels']] for node in ray.nodes()]))"
        )
        assert [each["GPU"] for each, _ in json.loads(nodes)] == [2, 2]
        assert [each["CPU"] for each, _ in json.loads(nodes)] == [1, 1]
        assert {each.get("rack") for _, each in json.loads(nodes)} == {None, "7"}
        assert names(local) >= {"gcs_server", "raylet"}
        assert local._launcher is not None
        local._launcher.kill()
        within(
            5, lambda: not names(local) & {"gcs_server", "raylet"}
        )  # its agents would give up after a minute
    assert is_gone(local)
    local.stop()  # once more: nothing to do


def test_a_cluster_ends_with_a_killed_starter() -> None:
    """Also if the starter forked a child that lives on and holds the pipe by which the launcher watches it."""
    code = (
        "import json, os, time; from dataclasses import asdict; from rm.runtime.local import LocalRay\n"
        "local = LocalRay.start(num_gpus=1, dashboard=False)\n"
        "if os.fork() == 0: time.sleep(20); os._exit(0)\n"
        "print(json.dumps(asdict(local)), flush=True); time.sleep(100)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], env=_clean(), stdout=subprocess.PIPE, text=True)
    with starter:
        assert starter.stdout is not None
        try:
            local = LocalRay(**json.loads(starter.stdout.readline()))
            assert names(local) >= {"gcs_server", "raylet"}
            starter.kill()
            within(5, lambda: is_gone(local))
        finally:
            starter.kill()
        starter.wait()
        starter.stdout.close()
        local.stop()


def test_a_cluster_that_outlives_its_starter_is_found_used_and_stopped(tmp_path: Path) -> None:
    """What `rmctl start --local` does. `ray job submit` needs no variable, though a token of other use lies about."""
    home, tmp, user = tmp_path / "rm", tmp_path / "tmp", tmp_path / "user"
    default = tmp / "ray" / "ray_current_cluster"
    (user / ".ray").mkdir(parents=True)
    (user / ".ray" / "auth_token").write_text("0" * 64)
    place = {"RAY_TMPDIR": str(tmp), "HOME": str(user)}
    python(
        "from rm.runtime.local import LocalRay\n"
        f"LocalRay.start(num_gpus=2, fate_share=False, home={str(home)!r})",
        **place,
    )
    local = LocalRay.find(home)
    assert local is not None
    try:
        assert default.read_text() == local.address.replace("127.0.0.1", "LOCALHOST")
        job = tmp_path / "job.py"
        job.write_text(
            "import os, ray, subprocess\n"
            "from rm.runtime.attach import attach\n"
            "class Actor:\n"
            "    def leave(self):\n"
            # A process of another session that forgot its environment.
            "        subprocess.Popen(['sleep', '1000'], env={}, start_new_session=True)\n"
            "        return os.environ['FROM_JOB']\n"
            "print('attached to', attach())\n"
            "actor = ray.remote(num_gpus=1)(Actor).options(name='a', lifetime='detached').remote()\n"
            "print('actor has', ray.get(actor.leave.remote()))\n"
            "print('driver has', ray.get_runtime_context().runtime_env['env_vars'])\n"
        )
        environment = ["--runtime-env-json", '{"env_vars": {"FROM_JOB": "kept"}}']
        submitted = subprocess.run(
            [Path(sys.executable).with_name("ray"), "job", "submit", *environment, "--", sys.executable, job],
            env={**_clean(), **place},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout
        for line in (f"attached to {local.address}", "actor has kept", "driver has {'FROM_JOB': 'kept'}"):
            assert line in submitted, submitted
        with pytest.raises(ClusterError, match="runs already"):
            LocalRay.start(fate_share=False, home=home)
        everything = members(local.key)
        assert names(local) >= {"gcs_server", "raylet", "sleep"}
        found = LocalRay.find(home)
        assert found is not None
        found.stop()
        assert not [
            process for process in everything if process.is_running() and process.status() != "zombie"
        ]
        assert is_gone(local)
        assert not default.exists()
        assert LocalRay.find(home) is None
        assert list(home.iterdir()) == []
    finally:
        local.stop()


def test_the_remains_of_a_cluster_that_is_gone_are_removed(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    default = tmp_path / "ray_current_cluster"
    default.write_text("LOCALHOST:7")
    gone = LocalRay("0123", str(tmp_path / "ray"), address="127.0.0.1:7", default_file=str(default))
    gone._claim(tmp_path / "local-ray.json")
    left = subprocess.Popen(["sleep", "1000"], env={MARK: gone.key})
    assert LocalRay.find(tmp_path) is None
    assert left.wait(30) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    default.write_text("10.0.0.1:6379")  # by another cluster in the meantime
    gone.stop()
    assert default.exists()


def test_a_cluster_that_is_being_started_is_not_started_twice(tmp_path: Path) -> None:
    record = tmp_path / "local-ray.json"
    starting = LocalRay("4567", str(tmp_path / "ray"))
    starting._claim(record)
    with pytest.raises(ClusterError, match="another process is starting"):
        LocalRay.start(fate_share=False, home=tmp_path)
    with pytest.raises(ClusterError, match="another process is starting"):
        starting._claim(record)
    os.utime(record, (0, 0))
    sleep = "import time; time.sleep(1000)  # rm.runtime.local_launcher"
    launcher = subprocess.Popen([sys.executable, "-c", sleep], env={MARK: starting.key})
    within(5, lambda: members(starting.key))
    with pytest.raises(ClusterError, match="another process is starting"):
        LocalRay.find(tmp_path)
    launcher.kill()
    launcher.wait()
    assert LocalRay.find(tmp_path) is None  # it was given up half-way
    assert not record.exists()
    record.write_text("{}")
    with pytest.raises(ClusterError, match="remove it"):
        LocalRay.find(tmp_path)


def test_a_start_that_fails_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="rm-", dir="/tmp") as short:
        with pytest.raises(ClusterError, match=r"did not finish within 0\.3 s"):
            LocalRay.start(temp_dir=short, timeout_s=0.3)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
        with pytest.raises(ClusterError, match=r"its launcher ended, and said last: .*RAY_AUTH_TOKEN_PATH"):
            LocalRay.start(temp_dir=short)
        assert os.listdir(short) == []


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_gpus": -1}, "num_gpus"),
        ({"num_cpus": 0}, "num_cpus"),
        ({"nodes": 0}, "nodes"),
        ({"nodes": 2, "labels": [{}]}, "labels"),
        ({"fate_share": False}, "home"),
        ({"temp_dir": None}, "temp_dir"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], field: str, tmp_path: Path) -> None:
    if field == "temp_dir":
        long = tmp_path / ("x" * 60)
        long.mkdir()
        arguments = {"temp_dir": long}
    with pytest.raises(InvalidSpec, match=field) as caught:
        LocalRay.start(**arguments)
    assert caught.value.field == field
    if field == "temp_dir":
        assert list(long.iterdir()) == []


def test_another_clusters_claim_to_be_the_default_is_respected_while_it_lives(tmp_path: Path) -> None:
    file = tmp_path / "ray" / "ray_current_cluster"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        file.parent.mkdir()
        file.write_text(f"127.0.0.1:{other.getsockname()[1]}")
        assert become_default("127.0.0.1:4321", file) == ""
    assert become_default("127.0.0.1:4321", file) == str(file)
    assert file.read_text() == "LOCALHOST:4321"


@pytest.mark.parametrize(
    ("found", "visible", "wanted", "nodes", "expected", "sentence"),
    [
        (8, None, None, 1, [("V", "0,1,2,3,4,5,6,7")], "8 of 8 real GPUs (H200)"),
        (8, None, 2, 1, [("V", "0,1")], "2 of 8 real GPUs (H200)"),
        (
            8,
            ["4", "5", "6"],
            None,
            3,
            [("V", "4"), ("V", "5"), ("V", "6")],
            "3 of 8 real GPUs (H200) on 3 nodes",
        ),
        (2, None, 2, 2, [("", "")] * 2, "only 2 found: 4 logical GPUs on 2 nodes, accounting only"),
        (1, None, None, 2, [("", "")] * 2, "only 1 found: 8 logical GPUs on 2 nodes, accounting only"),
        (1, None, 0, 1, [("", "")], "only 1 found: 0 logical GPUs, accounting only"),
        (0, ["0"], None, 1, [("", "")], "no GPU found: 4 logical GPUs, accounting only"),
    ],
)
def test_real_gpus_are_used_where_there_are_enough(
    monkeypatch: pytest.MonkeyPatch,
    found: int,
    visible: list[str] | None,
    wanted: int | None,
    nodes: int,
    expected: list[tuple[str, str]],
    sentence: str,
) -> None:
    from ray._private import accelerators

    class Kind:
        get_visible_accelerator_ids_env_var = staticmethod(lambda: "V")
        get_current_process_visible_accelerator_ids = staticmethod(lambda: visible)
        get_current_node_num_accelerators = staticmethod(lambda: found)
        get_current_node_accelerator_type = staticmethod(lambda: "H200")

    monkeypatch.setenv("V", ",".join(visible or []))
    monkeypatch.setattr(accelerators, "get_accelerator_manager_for_resource", lambda _: Kind)
    local = LocalRay("cdef", "/nowhere")
    assert local_launcher._share_gpus(local, wanted, nodes) == expected
    assert local.describe_gpus() == sentence
    assert ("V" in os.environ) == local.real_gpus
    assert LocalRay(**asdict(local)) == local
