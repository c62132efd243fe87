"""Starting the allocator: from several processes at once, on the head, with a ledger that outlives Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from probes import wait_until

from rm.ledger import check
from rm.runtime.local import LocalRay

pytestmark = [pytest.mark.own_ray, pytest.mark.timeout(180)]

CONNECT = """
import json, sys, ray, rm
client = rm.connect(sys.argv[1])
from ray._private.state import actors
where = {each["Name"]: each["Address"]["NodeID"] for each in actors().values() if each["State"] == "ALIVE"}
(head,) = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
job = client.submit("echo once", num_gpus=1)
job.wait(120)
print(json.dumps({**client.hello(), "on_head": where["allocator"] == head == where["store"], "job": job.id,
                  "allocators": sum(each["Name"] == "allocator" for each in actors().values())}))
"""


def connect(address: str, home: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "RM_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", CONNECT, address],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers(children: list[subprocess.Popen[str]]) -> list[dict]:
    said = [child.communicate(timeout=120) for child in children]
    assert all(child.returncode == 0 for child in children), said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def test_clients_that_start_it_at_once_get_the_same_one_and_its_ledger_outlives_ray(tmp_path: Path) -> None:
    with LocalRay.start(num_gpus=2, num_cpus=2, nodes=2, dashboard=False) as head:
        first = answers([connect(head.address, tmp_path) for _ in range(3)])
    assert len({each["pid"] for each in first}) == 1
    assert {each["allocators"] for each in first} == {1}
    assert all(each["on_head"] for each in first), "allocator and store live on the head node"
    assert {each["job"] for each in first} == {"j1", "j2", "j3"}
    with LocalRay.start(num_gpus=2, num_cpus=2, dashboard=False) as head:
        (second,) = answers([connect(head.address, tmp_path)])
    assert second["ledger_key"] == first[0]["ledger_key"], "the same ledger under a new Ray"
    assert second["job"] == "j4"


def rmctl(*words: str, address: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RM_HOME": str(home), "RAY_ADDRESS": address}
    code = "from rm.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.long
def test_a_damaged_ledger_is_restored_and_running_jobs_notice_nothing(tmp_path: Path) -> None:
    home, backup, pids = tmp_path / "home", tmp_path / "ledger.backup", tmp_path / "pids"
    with LocalRay.start(num_gpus=2, num_cpus=2, dashboard=False) as ray:

        def run(*words: str, code: int = 0) -> str:
            ran = rmctl(*words, address=ray.ray_address, home=home)
            assert ran.returncode == code, (words, ran.stdout, ran.stderr)
            return ran.stdout + ran.stderr

        run("submit", "-g", "1", "--", "bash", "-c", f"echo $$ >> {pids}; while :; do sleep 0.2; done")
        wait_until(pids.exists, 60, "j1 runs")
        run("ledger", "backup", str(backup))
        assert "(ray::Allocator)" in run("ledger", "restore", str(backup), code=3)
        run("stop", "--keep-jobs")
        for each in home.glob("ledger.sqlite*"):
            each.write_bytes(b"rust" * 5000)
        assert "then `rmctl start`" in run("start", code=3)
        assert "had not been able to open its ledger" in run("stop", "--keep-jobs")
        run("ledger", "restore", str(backup))
        assert run("submit", "-g", "1", "--", "true").split()[0] == "j100002"
        assert "RUNNING" in run("show", "j1")
        assert len(pids.read_text().split()) == 1, "it was taken over and not started again"
        run("stop", "--cancel-jobs")
    assert check(home / "ledger.sqlite").findings == []
