"""GPUs that Ray counts free while a process which nobody started is on them. The driver is played, all else is real."""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from probes import actor_pids, wait_until

pytestmark = pytest.mark.ray

DRIVER = '''
"""As `pynvml`, for as many GPUs as the file beside it lists: for each (pid, bytes) of its processes.

And the Xid numbers in the file "xids", whose lines are events: those that come after a watch has begun are heard.
"""
import json, pathlib, time, types

class NVMLError(Exception):
    def __init__(self, value):
        self.value = value

NVML_SUCCESS, NVML_ERROR_TIMEOUT, NVML_ERROR_GPU_IS_LOST = 0, 10, 15
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 1
nvmlEventTypeXidCriticalError = 8
nvmlInit = nvmlShutdown = lambda: None
gpus = lambda: json.loads(pathlib.Path(__file__).with_name("gpus.json").read_text())
nvmlDeviceGetCount = lambda: len(gpus())
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetComputeRunningProcesses = lambda index: [
    types.SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpus()[index]
]
said = lambda name: (pathlib.Path(__file__).with_name(name).read_text().splitlines()
                     if pathlib.Path(__file__).with_name(name).exists() else [])
nvmlDeviceGetRemappedRows = lambda index: (0, 0, 0, 0)
nvmlDeviceGetTotalEccErrors = lambda index, kind, counter: said("ecc").count(str(index))
nvmlDeviceGetIndex = lambda device: device
nvmlEventSetCreate = lambda: {"seen": len(said("xids"))}
nvmlDeviceRegisterEvents = lambda device, kind, events: events.setdefault("device", device)

def nvmlEventSetWait_v2(events, timeout_ms):
    while len(said("xids")) <= events["seen"]:
        time.sleep(0.01)
    events["seen"] += 1
    number = int(said("xids")[events["seen"] - 1])
    return types.SimpleNamespace(device=events["device"], eventData=number)
'''


class Driver:
    """What a node's driver says from now on."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "gpus.json"
        self.gate = folder / "gate"
        os.mkfifo(self.gate)
        (folder / "pynvml.py").write_text(DRIVER)
        self.says([], [])

    def says(self, *gpus: list[int]) -> None:
        """The pids on each GPU, with 2 GiB each."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps([[(pid, 2**31) for pid in pids] for pids in gpus]))
        fresh.replace(self._file)

    def open_gate(self) -> None:
        """Let go on whoever reads a line there."""
        self.gate.write_text("go on\n")

    def report(self, xid: int) -> None:
        """An error event of that number on every GPU that is watched."""
        with (self._file.parent / "xids").open("a") as file:
            file.write(f"{xid}\n")

    def counts(self, *gpus: int) -> None:
        """From now on one uncorrectable memory error for each time that a GPU is named."""
        fresh = self._file.with_name("ecc.new")
        fresh.write_text("".join(f"{gpu}\n" for gpu in gpus))
        fresh.replace(self._file.with_name("ecc"))


@pytest.fixture(scope="module")
def driver(ray_cluster: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A node more, named by its GPU type, with two GPUs and a driver that can be read."""
    folder, client = tmp_path_factory.mktemp("driver"), ray_cluster.client
    driver = Driver(folder)
    node = ray_cluster.cluster.add_node(
        num_cpus=4,
        num_gpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        include_log_monitor=False,
        labels={"ray.io/accelerator-type": "L4"},
        env_vars={"PYTHONPATH": str(folder)},
    )
    try:
        wait_until(lambda: the_node(client), 20, "it has joined")
        yield driver
    finally:
        ray_cluster.cluster.remove_node(node)
        wait_until(lambda: the_node(client) is None, 30, "it has left")


def the_node(client: Any) -> Any:
    return next((each for each in client.nodes() if each.gpu_type == "L4"), None)


def test_a_gpu_that_a_stray_is_on_is_given_to_nobody_until_it_is_gone(client, driver: Driver) -> None:
    stray = subprocess.Popen(["sleep", "1000"])
    try:
        driver.says([stray.pid], [])
        finding = wait_until(
            lambda: next((each for each in client.audit().findings if each.kind == "gpu_in_use"), None),
            30,
            "it is found",
        )
        assert (finding.repair, finding.repaired) == ("in quarantine", False)
        assert (finding.evidence["gpu"], finding.evidence["pid"]) == (0, stray.pid)
        node = the_node(client)
        assert (node.quarantined_gpus, node.free_gpus, node.foreign_gpus) == (1, 1, 0)
        assert [(each["pid"], each["name"], each["user"]) for each in node.strays] == [
            (stray.pid, "sleep", getpass.getuser())
        ]

        # Left to itself Ray gives the first GPU, which the stray is on.
        one = client.submit("echo $CUDA_VISIBLE_DEVICES", num_gpus=1, gpu_type="L4")
        assert one.wait(120).status == "SUCCEEDED"
        assert one.logs(rank=0) == "1\n"
        both = client.submit("echo $CUDA_VISIBLE_DEVICES", num_gpus=2, gpu_type="L4")
        assert both.why()["evidence"]["quarantined_gpus"] == 1

        pid = client.hello()["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: client.hello()["pid"] != pid, 20, "the allocator is back")
        assert the_node(client).quarantined_gpus == 1, "it has not given it away meanwhile"
        wait_until(lambda: client.audit() and the_node(client).strays, 30, "and knows why")
        assert both.status == "QUEUED"
    finally:
        stray.kill()
        stray.wait()
    driver.says([], [])
    wait_until(lambda: client.audit() and not the_node(client).quarantined_gpus, 30, "it is given back")
    assert both.wait(120).status == "SUCCEEDED"
    assert both.logs(rank=0) == "0,1\n"
    assert not [name for name in actor_pids() if name.startswith("rm-warden/")]
    told = [event.body["units"] for event in client.events(limit=100_000) if event.kind == "GpusQuarantined"]
    assert told[:2] == [20_000, 10_000], "all of the node, until it is known which GPU it is"
    assert told[-1] == 0


def test_what_an_ended_attempt_left_on_a_gpu_is_killed(client, driver: Driver) -> None:
    mark = f"{client.ledger_key}-j999999.1-0"
    left = subprocess.Popen(["sleep", "1000"], env={**os.environ, "RM_ATTEMPT_KEY": mark})
    try:
        driver.says([], [left.pid])
        assert wait_until(lambda: client.audit() and left.poll(), 30, "it is ended") == -signal.SIGKILL
        found = [each for each in client.audit(look=False).recent if each.kind == "left_behind"]
        assert [each.evidence["pid"] for each in found] == [left.pid]
    finally:
        left.kill()
        left.wait()
        driver.says([], [])
    wait_until(lambda: not client.audit().findings, 30, "nothing is left to find")
    assert the_node(client).quarantined_gpus == 0


def test_memory_errors_cordon_the_node_and_an_administrator_has_the_last_word(client, driver: Driver) -> None:
    driver.counts(1, 1)
    try:
        finding = wait_until(
            lambda: next((each for each in client.audit().findings if each.kind == "gpu_errors"), None),
            30,
            "it is found",
        )
        node = the_node(client)
        assert (node.status, node.cordon["by"]) == ("cordoned", "health")
        assert node.cordon["reason"] == (
            "GPU 1 has 2 uncorrectable memory errors since the driver was loaded: it needs a reset"
        )
        assert (finding.repair, finding.repaired) == ("the node is cordoned", False)
        client.uncordon(node.id)
        assert [each.repair for each in client.audit().findings] == ["reported only"]
        assert the_node(client).status == "ready"
        driver.counts(1, 1, 0)
        wait_until(lambda: client.audit() and the_node(client).status == "cordoned", 30, "there is news")
    finally:
        driver.counts()
    client.uncordon(the_node(client).id)
    wait_until(lambda: not client.audit().findings, 30, "nothing is left to find")
    told = [event.body["why"] for event in client.events(limit=100_000) if event.kind == "GpuErrorsSeen"]
    assert len(told) == 2


def test_a_gpu_that_breaks_costs_the_job_a_new_attempt_and_the_node_its_place(client, driver: Driver) -> None:
    once = '[ $RM_ATTEMPT = $RM_JOB_ID.1 ] && { echo go; read line < "$0"; exit 1; }; exit 0'
    job = client.submit(["sh", "-c", once, str(driver.gate)], num_gpus=1, gpu_type="L4")
    wait_until(lambda: "go" in job.logs(rank=0), 60, "it runs")
    driver.report(79)
    driver.open_gate()
    wait_until(lambda: the_node(client).status == "cordoned", 30, "its node is cordoned")
    assert the_node(client).cordon["reason"] == (
        f"GPU 0 reported Xid 79 (it has fallen off the bus), under {job.id}.1"
    )
    assert job.status == "QUEUED"
    client.uncordon(the_node(client).id)
    view = job.wait(60)
    assert (view.status, view.attempts, view.infra_failures) == ("SUCCEEDED", 2, 1)


def test_an_error_of_the_program_is_told_and_not_counted_against_the_node(client, driver: Driver) -> None:
    job = client.submit(
        ["sh", "-c", 'echo go; read line < "$0"; exit 3', str(driver.gate)], num_gpus=1, gpu_type="L4"
    )
    wait_until(lambda: "go" in job.logs(rank=0), 60, "it runs")
    driver.report(31)
    driver.open_gate()
    view = job.wait(60)
    assert (view.status, view.attempts, view.infra_failures) == ("FAILED", 1, 0)
    assert view.outcome["exit_code"] == 3
    assert "GPU 0 reported Xid 31 (a memory page fault)" in view.outcome["message"]
    assert the_node(client).status == "ready"
