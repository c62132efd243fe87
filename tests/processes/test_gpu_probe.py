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
from rm.runtime.gpu_probe import processes, read_gpus

GIB = 2**30


class Driver:
    """What `pynvml` answers: for each GPU, (pid, bytes) of its processes."""

    def __init__(self, *gpus: list[tuple[int, int | None]]) -> None:
        self.gpus = gpus

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
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
    assert processes(driver, tmp_path) == [
        GpuProcess(0, 12, "python) (x", 30 * GIB, "k-j1.1-0", me),
        GpuProcess(1, 14, "python", GIB, RAY, me),
        GpuProcess(1, 20, "jupyter", 2 * GIB, "", me),
        GpuProcess(3, 99, "not visible from here", 0, ""),
    ]


def test_a_real_process_is_found_by_its_mark() -> None:
    marked = subprocess.Popen(["sleep", "60"], env={**os.environ, "RM_ATTEMPT_KEY": "k-j2.1-0"})
    try:
        wait_until(lambda: Path(f"/proc/{marked.pid}/comm").read_text() == "sleep\n", what="it has begun")
        (found,) = processes(Driver([(marked.pid, GIB)]))
    finally:
        marked.kill()
        marked.wait()
    assert (found.name, found.owner) == ("sleep", "k-j2.1-0")


def test_the_real_driver() -> None:
    found = read_gpus()
    if isinstance(found, str):
        assert found.startswith("no NVML")
        pytest.skip(f"this machine has {found}")
    assert all(each.pid > 0 and each.memory_bytes >= 0 for each in found)
