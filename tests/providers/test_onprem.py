"""Machines you own: what is refused, which machine a launch takes, and all of it over ssh to this machine."""

from __future__ import annotations

import copy
import getpass
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_cluster import drive
from probes import wait_until

from rm.errors import InvalidSpec
from rm.providers.surroundings import NODE
from rm.runtime.local_processes import free_port, members

pytestmark = [pytest.mark.own_ray, pytest.mark.xdist_group("local_cluster")]

REPO = Path(__file__).resolve().parents[2]
TYPE, KIND = "ray-user-node-type", "ray-node-type"
WORKER = {TYPE: "gpu4", KIND: "worker"}
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
MISSING = [name for name in ("ssh", "rsync") if not shutil.which(name)] + ([] if SSHD else ["sshd"])


@pytest.fixture
def config() -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config

    prepared: dict[str, Any] = prepare_config(yaml.safe_load((REPO / "cluster.onprem.yaml").read_text()))
    return prepared


def bootstrap(config: dict[str, Any]) -> dict[str, Any]:
    from rm.providers.onprem import OnPremNodeProvider

    ready: dict[str, Any] = OnPremNodeProvider.bootstrap_config(config)
    return ready


@pytest.mark.parametrize(
    ("machines", "message"),
    [
        ({"gpu9": ["a"]}, "machines.gpu9: no such node type"),
        ({"gpu8": ["10.0.0.11"]}, "10.0.0.11 is listed twice"),
        ({"gpu8": ["a:b"]}, "must be HOST or HOST:PORT"),
        ({"gpu8": ["-oProxyCommand=x"]}, "must be HOST or HOST:PORT"),
        ({"gpu8": []}, "provider.machines.gpu8"),
        ({"gpu8": None}, "provider.machines.gpu8"),
        ({"head": ["a", "b"]}, "provider.machines.head: one machine"),
    ],
)
def test_machines_that_do_not_fit_are_refused(config: dict[str, Any], machines: Any, message: str) -> None:
    config["provider"]["machines"] |= machines
    with pytest.raises(InvalidSpec, match=message):
        bootstrap(config)


def test_a_type_without_machines_is_refused(config: dict[str, Any]) -> None:
    del config["provider"]["machines"]["gpu8"]
    with pytest.raises(InvalidSpec, match=r"machines\.gpu8: missing"):
        bootstrap(config)


def test_no_type_has_more_nodes_than_machines(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu4"]["max_workers"] = 50
    assert bootstrap(config)["available_node_types"]["gpu4"]["max_workers"] == 2


def test_a_launch_takes_free_machines_that_answer_or_none(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    from rm.providers import onprem

    section = bootstrap(config)["provider"] | {"directory": str(tmp_path)}
    nodes = onprem.OnPremNodeProvider(section, "c")
    silent = {"10.0.0.11"}
    monkeypatch.setattr(onprem, "answers", lambda machine: machine not in silent)
    with pytest.raises(
        NodeLaunchException, match=r"2 asked for, 1 of 2 .* no answer from 10\.0\.0\.11"
    ) as caught:
        nodes.create_node({}, WORKER, 2)
    assert caught.value.category == "NoCapacity"
    (first,) = nodes.create_node({}, WORKER, 1)
    assert nodes.internal_ip(first) == "10.0.0.12"
    silent.clear()
    (second,) = onprem.OnPremNodeProvider(section, "c").create_node({}, WORKER, 1)
    assert nodes.internal_ip(second) == "10.0.0.11"
    with pytest.raises(NodeLaunchException, match="1 asked for, 0 of 2"):
        nodes.create_node({}, WORKER, 1)


def test_a_machine_that_could_not_be_cleaned_is_cleaned_before_its_next_use(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rm.providers import onprem

    asked: list[tuple[str, str]] = []
    down = {"10.0.0.11"}

    def over_ssh(_: Any, machine: str, command: str) -> None:
        asked.append((machine, command))
        if machine in down:
            raise subprocess.CalledProcessError(255, "ssh", stderr=b"no route")

    monkeypatch.setattr(onprem, "answers", lambda _: True)
    monkeypatch.setattr(onprem.OnPremNodeProvider, "_over_ssh", over_ssh)
    nodes = onprem.OnPremNodeProvider(bootstrap(config)["provider"] | {"directory": str(tmp_path)}, "c")
    (first,) = nodes.create_node({}, WORKER, 1)
    nodes.terminate_node(first)
    assert nodes.non_terminated_nodes({}) == [], "nobody waits for a machine that is down"
    down.clear()
    asked.clear()
    (clean,) = nodes.create_node({}, WORKER, 1)
    assert (nodes.internal_ip(clean), asked) == ("10.0.0.12", [])
    nodes.create_node({}, WORKER, 1)
    assert [machine for machine, _ in asked] == ["10.0.0.11"]
    assert f"onprem/c/{first}" in asked[0][1]


def test_ray_down_goes_to_every_machine_the_heads_first(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rm.providers import onprem

    asked: list[str] = []
    monkeypatch.setattr(onprem.OnPremNodeProvider, "_over_ssh", lambda _, machine, __: asked.append(machine))
    nodes = onprem.OnPremNodeProvider(bootstrap(config)["provider"] | {"directory": str(tmp_path)}, "c")
    all_of_them = nodes.nodes_for_teardown({KIND: "worker"}) + nodes.nodes_for_teardown({KIND: "head"})
    nodes.terminate_nodes(all_of_them)
    assert asked[0] == "10.0.0.10"
    assert sorted(asked) == ["10.0.0.10", "10.0.0.11", "10.0.0.12", "10.0.0.13"]
    assert nodes.nodes_for_teardown({}) == []


def test_the_head_knows_itself_and_its_key(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rm.providers import onprem

    monkeypatch.setattr(onprem, "answers", lambda _: True)
    section = bootstrap(config)["provider"]
    nodes = onprem.OnPremNodeProvider(section | {"directory": str(tmp_path / "here")}, "c")
    (head,) = nodes.create_node({}, {TYPE: "head", KIND: "head"}, 1)
    remote = copy.deepcopy(config)
    remote["auth"]["ssh_private_key"] = "~/ray_bootstrap_key.pem"
    section = nodes.prepare_for_head_node(remote)["provider"] | {"directory": str(tmp_path / "there")}
    there = onprem.OnPremNodeProvider(section, "c")
    assert there.non_terminated_nodes({KIND: "head"}) == [head]
    assert there.internal_ip(head) == "10.0.0.10"
    assert there._auth["ssh_private_key"] == "~/ray_bootstrap_key.pem"


# --- over ssh ------------------------------------------------------------------------------------------------


@contextmanager
def sshd(directory: Path, addresses: list[str], home: Path) -> Iterator[tuple[int, Path]]:
    """An sshd of our own on these loopback addresses: its port, and the key that it lets in. Sessions get `home`."""
    assert SSHD
    for key in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / key)], check=True
        )
    shutil.copy(directory / "user.pub", directory / "authorized")
    port = free_port()
    passed = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), **{
        name: value for name, value in os.environ.items() if name.startswith(("RAY_AUTH_", "RM_TEST_"))
    }}  # fmt: skip
    setting = " ".join(f'"{name}={value}"' for name, value in passed.items())
    (directory / "sshd_config").write_text(
        "".join(f"ListenAddress {each}:{port}\n" for each in addresses)
        + f"HostKey {directory}/host\nAuthorizedKeysFile {directory}/authorized\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"MaxStartups 50\nSetEnv {setting}\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(directory / "sshd_config")], stderr=subprocess.PIPE
    )
    try:
        from rm.providers.onprem import answers

        wait_until(lambda: server.poll() is not None or answers(f"{addresses[-1]}:{port}"), 10, "sshd")
        assert server.poll() is None, server.stderr and server.stderr.read()
        yield port, directory / "user"
    finally:
        server.terminate()
        server.communicate(timeout=10)


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {MISSING} (Debian: apt-get install openssh-server rsync)"
)
@pytest.mark.skipif(os.geteuid() != 0, reason="an sshd of our own can let in its own user only; run as root")
def test_machines_over_ssh_grow_shrink_and_end() -> None:
    """Four loopback addresses stand for four machines. Only the marks tell what belongs to which node."""
    directory = Path(tempfile.mkdtemp(prefix="rm", dir="/tmp"))
    home = directory / "home"
    home.mkdir()
    (home / ".bashrc").write_text("")
    (home / ".profile").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    addresses = [f"127.0.0.{number}" for number in range(1, 5)]
    gcs = free_port()
    try:
        with sshd(directory, addresses, home) as (port, key):
            config = yaml.safe_load((REPO / "cluster.onprem.yaml").read_text())
            config |= {"cluster_name": f"t{os.getpid()}", "idle_timeout_minutes": 0.02}
            config["auth"] = {"ssh_user": getpass.getuser(), "ssh_private_key": str(key)}
            machines = [f"{each}:{port}" for each in addresses]
            config["provider"] |= {
                "machines": {"head": machines[:1], "gpu4": machines[1:3], "gpu8": machines[3:]},
                "stop_command": f"{sys.executable} -m rm.providers.stop",
            }
            # All four are one machine in truth, whose Ray nodes must keep out of each other's way.
            shared = f"export RAY_START_HOOK=rm.providers.loopback.share_machine RAY_TMPDIR={directory}/ray"
            one = f"{shared} RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1 AUTOSCALER_UPDATE_INTERVAL_S=1"
            start = "ray start --include-dashboard=false --include-log-monitor=false"
            flags = f"--port={gcs} --ray-client-server-port={free_port()}"
            flags += " --autoscaling-config=~/ray_bootstrap_config.yaml"
            config["head_start_ray_commands"] = ["ray stop", f"{one}; {start} --head {flags}"]
            config["worker_start_ray_commands"] = ["ray stop", f"{one}; ray start --address=LOCALHOST:{gcs}"]
            file = directory / "c.yaml"
            file.write_text(yaml.safe_dump(config))
            environment = {**os.environ, "HOME": str(home), "TMPDIR": str(directory)}
            mark = f"onprem/{config['cluster_name']}"

            def ray(*words: str) -> None:
                done = subprocess.run(
                    ["ray", *words], env=environment, capture_output=True, text=True, timeout=150
                )
                assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]

            stranger = subprocess.Popen(["sleep", "300"], env={**os.environ, NODE: f"{mark}2/gpu4-1"})
            try:
                ray("up", "-y", str(file))
                grown = drive(
                    f"127.0.0.1:{gcs}",
                    """
                    group = placement_group([{"GPU": 2}])
                    ray.get(group.ready(), timeout=90)
                    grown = nodes()
                    remove_placement_group(group)
                    alone()
                    print(json.dumps(sorted(gpus for gpus, _ in grown.values())))
                    """,
                    environment,
                )
                assert grown == [0, 4]
                wait_until(lambda: not members(f"{mark}/gpu4", NODE), 30)
                assert members(mark, NODE)
                ray("down", "-y", str(file))
                assert not members(mark, NODE)
                assert stranger.poll() is None
            except BaseException:
                for log in sorted((directory / "ray/ray/session_latest/logs").glob("monitor.*")):
                    print(log.name, log.read_text()[-6000:])
                raise
            finally:
                stranger.kill()
                stranger.wait()
            left = [each.name for each in home.rglob("*") if not each.is_dir()]
            assert sorted(left) == [".bashrc", ".profile"]
            assert not [each.name for each in directory.iterdir() if each.name.startswith("ray-")]
    finally:
        from rm.runtime.local_processes import end

        end(f"onprem/t{os.getpid()}", NODE)
        shutil.rmtree(directory, ignore_errors=True)
