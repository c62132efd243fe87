"""What NVIDIA's driver says of a node's GPUs: which processes hold how much memory, and how the GPUs are.

Runs on the node, as a Ray task or in a runner.

The node needs `nvidia-ml-py` (the extra "gpu"). In a container without the machine's process ids the driver names
processes that can't be looked up, or none: nothing can be said about whose they are.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rm.core.audit import RAY, DriverLook, GpuProcess
from rm.core.gpu_errors import GpuCondition
from rm.runtime.processes import ATTEMPT_KEY

MOST_ANCESTORS = 64
ACTIONS = {
    "NVML_GPU_RECOVERY_ACTION_NONE": "",
    "NVML_GPU_RECOVERY_ACTION_GPU_RESET": "a reset",
    "NVML_GPU_RECOVERY_ACTION_NODE_REBOOT": "a restart of its node",
    "NVML_GPU_RECOVERY_ACTION_DRAIN_P2P": "its peers to be drained",
    "NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET": "to be drained, and a reset",
    "NVML_GPU_RECOVERY_ACTION_RECOVER_IMEX_DOMAIN": "its IMEX domain to be recovered",
    "NVML_GPU_RECOVERY_ACTION_BUS_RESET": "a reset of its bus",
    "NVML_GPU_RECOVERY_ACTION_SYSTEM_REBOOT": "a restart of its node",
}
"""What the driver can want, by `pynvml`'s names: older versions of it lack some, or all."""


@cache
def can_look() -> bool:
    """Whether `pynvml` is installed. Asked between any two jobs, and the answer takes a search of the disk."""
    return find_spec("pynvml") is not None


def read_gpus() -> DriverLook | str:
    """This node's GPUs and the processes on them; in words where they can't be read, and why."""
    if not can_look():
        return "no NVML (pip install nvidia-ml-py)"
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVML ({error})"
    try:
        return look(pynvml)
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
        for each in found.processes
        if each.owner == mark or (each.owner == "" and whole and each.gpu in named)
    ]


def look(nvml: Any, proc: Path = Path("/proc")) -> DriverLook:
    """All GPUs and their compute processes, by the module `pynvml` or what looks like it. Raises NVMLError."""
    found: list[GpuProcess] = []
    conditions = []
    for gpu in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
            running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except nvml.NVMLError as error:
            if getattr(error, "value", None) != nvml.NVML_ERROR_GPU_IS_LOST:
                raise
            conditions.append(GpuCondition(gpu, lost=True))
            continue
        conditions.append(condition(nvml, gpu, handle))
        for each in running:
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
    return DriverLook(tuple(found), tuple(conditions))


def condition(nvml: Any, gpu: int, handle: Any) -> GpuCondition:
    """How the GPU is. What it has no counter for, or its driver no answer to, counts as being well."""
    _, _, pending, failed = _answer(nvml, lambda: nvml.nvmlDeviceGetRemappedRows(handle)) or (0, 0, 0, 0)
    uncorrected = _answer(
        nvml,
        lambda: nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
    )
    return GpuCondition(
        gpu,
        uncorrected=uncorrected or 0,
        remap_pending=bool(pending),
        remap_failed=bool(failed),
        action=_wanted(nvml, handle),
    )


def device(nvml: Any, gpu_id: str) -> Any:
    """NVML's handle of a GPU as CUDA_VISIBLE_DEVICES names it: by number or by UUID. Raises NVMLError."""
    if gpu_id.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(gpu_id))
    return nvml.nvmlDeviceGetHandleByUUID(gpu_id)


def _wanted(nvml: Any, handle: Any) -> str | None:
    """What the driver wants done about the GPU; None where it has no opinion."""
    field = getattr(nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", None)
    answer = field and _answer(nvml, lambda: nvml.nvmlDeviceGetFieldValues(handle, [field])[0])
    if not answer or answer.nvmlReturn != nvml.NVML_SUCCESS:
        return None
    known = {getattr(nvml, name): words for name, words in ACTIONS.items() if hasattr(nvml, name)}
    return known.get(answer.value.uiVal, f"what NVML calls recovery action {answer.value.uiVal}")


def _answer(nvml: Any, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except nvml.NVMLError:
        return None


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
