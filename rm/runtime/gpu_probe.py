"""What NVIDIA's driver says of a node's GPUs: which processes hold how much memory. Runs on the node, as a Ray task.

The node needs `nvidia-ml-py` (the extra "gpu"). In a container without the machine's process ids the driver names
processes that can't be looked up, or none: nothing can be said about whose they are.
"""

from __future__ import annotations

import os
import pwd
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rm.core.audit import RAY, GpuProcess
from rm.runtime.processes import ATTEMPT_KEY

MOST_ANCESTORS = 64


@cache
def can_look() -> bool:
    """Whether `pynvml` is installed. Asked between any two jobs, and the answer takes a search of the disk."""
    return find_spec("pynvml") is not None


def read_gpus() -> list[GpuProcess] | str:
    """The processes on this node's GPUs; in words where they can't be read, and why."""
    if not can_look():
        return "no NVML (pip install nvidia-ml-py)"
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVML ({error})"
    try:
        return processes(pynvml)
    except pynvml.NVMLError as error:
        return f"NVML failed ({error})"
    finally:
        pynvml.nvmlShutdown()


def left_on(gpu_ids: tuple[str, ...], mark: str) -> list[str]:
    """Processes that hold memory of these GPUs of the node and bear `mark`, or nobody's; empty without NVML.

    `gpu_ids` as Ray and CUDA_VISIBLE_DEVICES have them; devices that they don't name by number are all looked at.
    """
    found = read_gpus()
    if isinstance(found, str):
        return []
    named = {int(each) for each in gpu_ids if each.isdecimal()}
    whole = len(named) == len(gpu_ids)
    return [
        f"{each.name} ({each.pid}) on GPU {each.gpu}"
        for each in found
        if each.owner == mark or (each.owner == "" and whole and each.gpu in named)
    ]


def processes(nvml: Any, proc: Path = Path("/proc")) -> list[GpuProcess]:
    """The compute processes of all GPUs, by the module `pynvml` or what looks like it. Raises NVMLError."""
    found = []
    for gpu in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
        for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            # The driver may not know how much: then nobody is accused.
            memory = each.usedGpuMemory or 0
            found.append(
                GpuProcess(
                    gpu,
                    each.pid,
                    _name(proc, each.pid),
                    memory,
                    _owner(proc, each.pid),
                    _user(proc, each.pid),
                )
            )
    return found


def _name(proc: Path, pid: int) -> str:
    try:
        return (proc / str(pid) / "comm").read_text().strip()
    except OSError:
        return "not visible from here"


def _user(proc: Path, pid: int) -> str:
    """Whose the process is: a name, or a number where the node knows none."""
    try:
        uid = (proc / str(pid)).stat().st_uid
    except OSError:
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _owner(proc: Path, pid: int) -> str:
    """The attempt's mark that the process bears; else RAY if it descends from a raylet; else ""."""
    try:
        environ = (proc / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        environ = []
    mark = next((each for each in environ if each.startswith(f"{ATTEMPT_KEY}=".encode())), b"")
    if mark:
        return os.fsdecode(mark.partition(b"=")[2])
    for _ in range(MOST_ANCESTORS):
        if _name(proc, pid) == "raylet":
            return RAY
        pid = _parent(proc, pid)
        if pid <= 1:
            return ""
    return ""


def _parent(proc: Path, pid: int) -> int:
    try:
        stat = (proc / str(pid) / "stat").read_text()
    except OSError:
        return 0
    # The name, in parentheses, may hold anything: what counts stands behind the last one.
    return int(stat.rpartition(")")[2].split()[1])
