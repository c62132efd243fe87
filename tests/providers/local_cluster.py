"""`ray up` and `ray down` of cluster.local.yaml for tests: with a name, a place and ports of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from rm.providers.local import LocalNodeProvider
from rm.providers.surroundings import NODE
from rm.runtime.local_processes import free_port, members

REPO = Path(__file__).resolve().parents[2]
DRIVER = """
import json, sys, time, ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.placement_group import placement_group, remove_placement_group
from rm.runtime.attach import attach

def nodes():
    return {n["NodeName"]: [n["Resources"].get("GPU", 0), n["Labels"].get("ray.io/accelerator-type")]
            for n in ray.nodes() if n["Alive"]}

def alone(timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while len(nodes()) > 1:
        assert time.monotonic() < deadline, nodes()
        time.sleep(0.2)

address = attach(sys.argv[1])
"""


def drive(address: str, code: str, environment: Mapping[str, str]) -> Any:
    """Run a driver on the cluster; what it printed last, as JSON."""
    words = [sys.executable, "-c", DRIVER + textwrap.dedent(code), address]
    done = subprocess.run(words, env=dict(environment), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


class LocalCluster:
    """One cluster. `directory`: all that this test's commands may write, Ray's copies of the YAML included."""

    def __init__(self, directory: Path, name: str, change: Mapping[str, Any], *, small: bool) -> None:
        self.directory, self.base, self.name = directory, directory / "n", name
        config = yaml.safe_load((REPO / "cluster.local.yaml").read_text())
        config |= {"cluster_name": name, "idle_timeout_minutes": 0.02}
        config["provider"] |= {
            "directory": str(self.base),
            "gcs_port": free_port(),
            "dashboard_port": free_port(),
        }
        config["provider"] |= change
        if small:  # neither dashboard nor allocator: a dozen processes less
            starts = config["head_start_ray_commands"][:2]
            config["head_start_ray_commands"] = [
                each.replace("--head", "--head --include-dashboard=false") for each in starts
            ]
        self.yaml = directory / f"{name}.yaml"
        self.yaml.write_text(yaml.safe_dump(config))
        self.provider = LocalNodeProvider(config["provider"], name)
        # Ray's file that names the machine's default cluster is not ours to write while other tests run.
        self.environment = {**os.environ, "TMPDIR": str(directory), "RAY_TMPDIR": str(directory / "r")}

    def ray(self, *words: str, timeout_s: float = 120, **environment: str) -> str:
        """Run `ray WORDS`; all that it printed. AssertionError: it failed."""
        done = subprocess.run(
            ["ray", *words],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def up(self, **environment: str) -> None:
        self.ray("up", "-y", str(self.yaml), **environment)

    def down(self, **environment: str) -> None:
        self.ray("down", "-y", str(self.yaml), **environment)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.provider._file.read().ports['gcs']}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.provider._file.read().ports['dashboard']}"

    def processes(self) -> set[psutil.Process]:
        return members(str(self.base / self.name), NODE)

    def left(self) -> list[str]:
        """Files and processes that are left, but for the YAML and Ray's empty directories."""
        files = [
            str(each) for each in self.directory.rglob("*") if not each.is_dir() and each.suffix != ".yaml"
        ]
        return (
            files
            + [str(each) for each in self.processes()]
            + [str(each) for each in [self.base] if each.exists()]
        )


@contextmanager
def local_cluster(name: str = "t", *, small: bool = False, **change: Any) -> Iterator[LocalCluster]:
    """A cluster that is ended whatever happens. `change`: fields of the YAML's `provider` section."""
    directory = Path(tempfile.mkdtemp(prefix="rm", dir="/tmp"))
    cluster = LocalCluster(directory, name, change, small=small)
    try:
        yield cluster
    finally:
        cluster.provider.cleanup_cluster_resources()
        shutil.rmtree(directory, ignore_errors=True)
