"""Reading the driver, from values as `pynvml` gives them; and with the real one where there is a GPU."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from probes import wait_until

from rm.core.audit import RAY, GpuProcess
from rm.core.gpu_errors import GpuCondition
from rm.runtime.gpu_probe import look, read_gpus

GIB = 2**30


class Failed(Exception):
    """As `pynvml.NVMLError`."""

    def __init__(self, value: int) -> None:
        self.value = value


class Driver:
    """What `pynvml` answers: for each GPU, (pid, bytes) of its processes. Nothing else, unless it is told."""

    NVMLError = Failed
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_GPU_IS_LOST, NVML_SUCCESS = 3, 15, 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
    NVML_GPU_RECOVERY_ACTION_NONE, NVML_GPU_RECOVERY_ACTION_GPU_RESET = 0, 1

    def __init__(self, *gpus: list[tuple[int, int | None]], **said: Any) -> None:
        self.gpus = gpus
        self.said = said
        """By counter: "rows", "errors", "action"; and "lost", the GPUs that are."""

    def _say(self, what: str) -> Any:
        if what not in self.said:
            raise Failed(self.NVML_ERROR_NOT_SUPPORTED)
        return self.said[what]

    def nvmlDeviceGetRemappedRows(self, handle: int) -> Any:  # noqa: N802
        return self._say("rows")

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> Any:  # noqa: N802
        assert (kind, counter) == (self.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self.NVML_VOLATILE_ECC)
        return self._say("errors")

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> Any:  # noqa: N802
        assert fields == [self.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        action = self._say("action")
        known = action is not None
        return [
            SimpleNamespace(nvmlReturn=0 if known else 3, value=SimpleNamespace(uiVal=action if known else 7))
        ]

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index in self.said.get("lost", ()):
            raise Failed(self.NVML_ERROR_GPU_IS_LOST)
        if index in self.said.get("odd", ()):
            raise Failed(self.NVML_ERROR_NOT_SUPPORTED)
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.gpus[handle]]


def proc(root: Path, pid: int, name: str, parent: int, environ: str = "") -> None:
    (root / str(pid)).mkdir()
    (root / str(pid) / "comm").write_text(f"{name}\n")
    (root / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} {pid} {pid} 0 -1 4194304")
    (root / str(pid) / "environ").write_bytes(environ.encode())


def test_each_process_is_told_with_its_owner(tmp_path: Path) -> None:
    proc(tmp_path, 10, "raylet", 1)
    proc(tmp_path, 11, "ray::Runner", 10)
    proc(tmp_path, 12, "python) (x", 11, "PATH=/bin\0RM_ATTEMPT_KEY=k-j1.1-0\0")
    proc(tmp_path, 13, "ray::train", 10)
    proc(tmp_path, 14, "python", 13)
    proc(tmp_path, 20, "jupyter", 1)
    me = pwd.getpwuid(os.getuid()).pw_name
    driver = Driver([(12, 30 * GIB)], [(14, GIB), (20, 2 * GIB)], [], [(99, None)])
    assert look(driver, tmp_path).processes == (
        GpuProcess(0, 12, "python) (x", 30 * GIB, "k-j1.1-0", me),
        GpuProcess(1, 14, "python", GIB, RAY, me),
        GpuProcess(1, 20, "jupyter", 2 * GIB, "", me),
        GpuProcess(3, 99, "not visible from here", 0, ""),
    )


@pytest.mark.parametrize(
    ("said", "condition", "trouble"),
    [
        ({}, GpuCondition(0), ""),
        ({"errors": 0, "rows": (1, 0, 0, 0), "action": 0}, GpuCondition(0, action=""), ""),
        (
            {"errors": 3},
            GpuCondition(0, uncorrected=3),
            "GPU 0 has 3 uncorrectable memory errors since the driver was loaded: it needs a reset",
        ),
        # They were contained: this driver would say so if the GPU needed anything.
        ({"errors": 3, "action": 0}, GpuCondition(0, uncorrected=3, action=""), ""),
        (
            {"errors": 3, "action": 1},
            GpuCondition(0, uncorrected=3, action="a reset"),
            "GPU 0 needs a reset (3 uncorrectable memory errors since the driver was loaded)",
        ),
        ({"action": 1}, GpuCondition(0, action="a reset"), "GPU 0 needs a reset"),
        (
            {"action": 77},
            GpuCondition(0, action="what NVML calls recovery action 77"),
            "GPU 0 needs what NVML calls recovery action 77",
        ),
        ({"action": None}, GpuCondition(0), ""),
        (
            {"rows": (0, 1, 1, 0)},
            GpuCondition(0, remap_pending=True),
            "GPU 0 has memory that is to be remapped: it needs a reset",
        ),
        (
            {"rows": (0, 9, 0, 1), "action": 0},
            GpuCondition(0, remap_failed=True, action=""),
            "GPU 0 has memory that could not be remapped: it needs to be replaced",
        ),
        (
            {"lost": [0]},
            GpuCondition(0, lost=True),
            "GPU 0 does not answer the driver: the node needs a restart",
        ),
    ],
)
def test_how_a_gpu_is(said: dict[str, Any], condition: GpuCondition, trouble: str) -> None:
    found = look(Driver([], **said))
    assert found.conditions == (condition,)
    assert condition.trouble() == trouble


def test_beside_a_lost_gpu_the_others_are_read_and_other_errors_are_not_hidden() -> None:
    found = look(Driver([], [(os.getpid(), GIB)], lost=[0]))
    assert [each.pid for each in found.processes] == [os.getpid()]
    with pytest.raises(Failed):
        look(Driver([], odd=[0]))


def test_a_real_process_is_found_by_its_mark() -> None:
    marked = subprocess.Popen(["sleep", "60"], env={**os.environ, "RM_ATTEMPT_KEY": "k-j2.1-0"})
    try:
        wait_until(lambda: Path(f"/proc/{marked.pid}/comm").read_text() == "sleep\n", what="it has begun")
        (found,) = look(Driver([(marked.pid, GIB)])).processes
    finally:
        marked.kill()
        marked.wait()
    assert (found.name, found.owner) == ("sleep", "k-j2.1-0")


def test_the_real_driver() -> None:
    found = read_gpus()
    if isinstance(found, str):
        assert found.startswith("no NVML")
        pytest.skip(f"this machine has {found}")
    assert all(each.pid > 0 and each.memory_bytes >= 0 for each in found.processes)
    assert found.conditions
