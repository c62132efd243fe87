"""Starting the allocator: from several processes at once, on the head, with a ledger that outlives Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rm.runtime.local import LocalRay

pytestmark = [pytest.mark.own_ray, pytest.mark.timeout(180)]

CONNECT = """
import json, sys, ray, rm
client = rm.connect(sys.argv[1])
from ray._private.state import actors
where = {each["Name"]: each["Address"]["NodeID"] for each in actors().values() if each["State"] == "ALIVE"}
(head,) = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
job = client.submit("echo once", num_gpus=1)
job.wait(60)
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
