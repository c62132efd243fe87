"""On real GPUs: who sees which, that memory is free for the next, shares, strays, errors that the driver reports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gpu_driver import driver
from probes import runner_pid, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

JOBS = Path(__file__).resolve().parents[2] / "jobs"
GIB = 2**30
HOLDER = "import torch, time; x = torch.ones(2 * 2**30, dtype=torch.uint8, device='cuda'); print('has', flush=True)"
"""Takes 2 GiB of the first GPU it sees."""

HOG = """
import os, signal, sys, torch
free, total = torch.cuda.mem_get_info()
print(f"{free / total:.3f}", flush=True)
x = torch.empty(int(total * 0.9), dtype=torch.uint8, device="cuda").fill_(1)
torch.cuda.synchronize()
how = sys.argv[1]
if how == "raise": raise ValueError("as told")
if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
if how == "abort": os.abort()
if how == "leave":
    if os.fork() == 0:
        os.setsid()
        signal.pause()
if how == "stay":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("stays", flush=True)
    while True: signal.pause()
"""
WILD = """
import ctypes, time
cuda = ctypes.CDLL("libcuda.so.1")
code = b'''
.version 6.3
.target sm_75
.address_size 64
.visible .entry wild() {
  .reg .b64 %where;
  .reg .b32 %what;
  mov.u64 %where, 0x123400000000;
  mov.u32 %what, 1;
  st.global.u32 [%where], %what;
  ret;
}
'''
context, module, kernel = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
assert cuda.cuInit(0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
assert cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuModuleLoadData(ctypes.byref(module), code) == 0
assert cuda.cuModuleGetFunction(ctypes.byref(kernel), module, b"wild") == 0
assert cuda.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, None, None, None) == 0
raise SystemExit(f"the driver says {cuda.cuCtxSynchronize()}")
"""


def only_node(client: Any) -> Any:
    (node,) = client.nodes()
    return node


def holders() -> set[str]:
    """The marks of the processes that are on GPUs ("" for strangers)."""
    return {each.owner for each in driver().processes}


@contextmanager
def stray() -> Iterator[int]:
    """A process that nobody started through us, with 2 GiB: its pid."""
    child = subprocess.Popen([sys.executable, "-c", f"{HOLDER}; time.sleep(1000)"], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"has\n"
        yield child.pid
    finally:
        child.kill()
        child.communicate()


def test_the_node_is_what_its_driver_says(client) -> None:
    import pynvml

    pynvml.nvmlInit()
    try:
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    finally:
        pynvml.nvmlShutdown()
    node = only_node(client)
    assert node.gpus == len(driver().conditions)
    assert node.gpu_type
    assert node.gpu_type in name
    assert [each.trouble() for each in driver().conditions] == [""] * node.gpus
    audit = client.audit()
    assert (audit.checked["drivers"], audit.findings) == (1, ())


def test_a_job_sees_the_gpus_it_asked_for(client) -> None:
    look = "import os, torch; print(os.environ['CUDA_VISIBLE_DEVICES'], torch.cuda.device_count())"
    job = client.submit([sys.executable, "-c", look], num_gpus=1, gpu_type=only_node(client).gpu_type)
    assert job.wait(120).status == "SUCCEEDED", job.logs()
    assert job.logs(rank=0) == "0 1\n"


def test_the_memory_of_a_job_is_free_for_the_next_however_it_ended(client, tmp_path: Path) -> None:
    (tmp_path / "hog.py").write_text(HOG)
    ways = {
        "exit": "SUCCEEDED",
        "raise": "FAILED",
        "kill": "FAILED",
        "leave": "SUCCEEDED",
        "abort": "FAILED",
        "last": "SUCCEEDED",
    }
    all_gpus = only_node(client).gpus
    jobs = client.submit_many(
        [f"{sys.executable} hog.py {how}" for how in ways],
        num_gpus=all_gpus,
        nproc_per_node=1,
        working_dir=tmp_path,
    )
    for job, (how, status) in zip(jobs, ways.items(), strict=True):
        view = job.wait(180)
        assert (view.status, view.attempts, view.infra_failures) == (status, 1, 0), (how, job.logs())
        assert float(job.logs(rank=0).split()[0]) > 0.97, how


def test_the_memory_of_a_job_that_does_not_stop_is_free_for_the_next(client, tmp_path: Path) -> None:
    (tmp_path / "hog.py").write_text(HOG)
    hog = f"{sys.executable} hog.py"
    options = {"num_gpus": only_node(client).gpus, "nproc_per_node": 1, "working_dir": tmp_path}
    stubborn = client.submit(f"{hog} stay", grace=1, **options)
    follower = client.submit(f"{hog} exit", **options)
    wait_until(lambda: "stays" in stubborn.logs(rank=0), 60, "it has its memory")
    stubborn.cancel()
    assert follower.wait(120).status == "SUCCEEDED", follower.logs()
    assert float(follower.logs(rank=0).split()[0]) > 0.97
    assert stubborn.status == "CANCELLED"


def on_the_gpu() -> float:
    import torch

    assert not torch.cuda.is_initialized()
    ones = torch.ones(1000, device="cuda")
    return float((ones @ ones).item())


def test_functions_compute_and_what_is_kept_warm_for_them_holds_no_gpu(client) -> None:
    jobs = [client.submit(on_the_gpu, num_gpus=1) for _ in range(4)]
    assert [job.result(timeout=120) for job in jobs] == [1000.0] * 4
    assert only_node(client).warm, "a runner waits for the next"
    assert holders() == set()


def test_two_jobs_share_one_gpu(client) -> None:
    holder = [sys.executable, "-u", "-c", f"{HOLDER}; time.sleep(1000)"]
    jobs = [client.submit(holder, num_gpus=0.5) for _ in range(2)]
    marks = {f"{client.ledger_key}-{job.id}.1-0" for job in jobs}
    wait_until(lambda: holders() == marks, 60, "both are on it")
    assert {each.gpu for each in driver().processes} == {0}
    assert client.audit().findings == ()
    for job in jobs:
        job.cancel()
    wait_until(lambda: not holders(), 60, "both have left it")


def test_a_gpu_with_a_stray_is_given_to_nobody_until_it_is_gone(client) -> None:
    node = only_node(client)
    with stray() as pid:
        finding = wait_until(
            lambda: next((each for each in client.audit().findings if each.kind == "gpu_in_use"), None),
            30,
            "it is found",
        )
        assert (finding.repair, finding.evidence["pid"]) == ("in quarantine", pid)
        assert finding.evidence["memory_bytes"] > 2 * GIB
        assert only_node(client).quarantined_gpus == 1
        job = client.submit("true", num_gpus=node.gpus)
        assert job.why()["evidence"]["quarantined_gpus"] == 1
        assert job.status == "QUEUED"
    assert job.wait(120).status == "SUCCEEDED"
    assert only_node(client).quarantined_gpus == 0


def test_out_of_memory_is_the_jobs_own_failure(client) -> None:
    code = "import torch; torch.empty(2**50, dtype=torch.uint8, device='cuda')"
    job = client.submit([sys.executable, "-c", code], num_gpus=1)
    view = job.wait(120)
    assert (view.status, view.infra_failures) == ("FAILED", 0)
    assert "OutOfMemoryError" in job.logs()
    assert "Xid" not in view.outcome["message"]


def test_an_error_of_the_program_that_the_driver_reports_is_told_and_not_counted_against_the_node(
    client,
) -> None:
    job = client.submit([sys.executable, "-c", WILD], num_gpus=1)
    view = job.wait(120)
    assert (view.status, view.attempts, view.infra_failures) == ("FAILED", 1, 0), job.logs()
    assert re.search(r"GPU 0 reported Xid (13|31) \(", view.outcome["message"]), (view.outcome, job.logs())
    assert only_node(client).status == "ready"
    assert client.submit(on_the_gpu, num_gpus=1).result(timeout=120) == 1000.0


def test_ranks_meet_through_nccl(client, tmp_path: Path) -> None:
    gpus = only_node(client).gpus
    (tmp_path / "meet.py").write_text(
        textwrap.dedent("""
        import os, torch, torch.distributed as dist
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        ones = torch.ones(1, device=device)
        dist.all_reduce(ones)
        if dist.get_rank() == 0:
            print("ranks", int(ones), torch.cuda.nccl.version())
        dist.destroy_process_group()
        """)
    )
    job = client.submit(
        f"{sys.executable} meet.py", num_gpus=gpus, nproc_per_node="gpu", working_dir=tmp_path
    )
    assert job.wait(180).status == "SUCCEEDED", job.logs()
    assert job.logs(rank=0).startswith(f"ranks {gpus} ")


@pytest.mark.parametrize("command", ["train_digits.py --steps 150", "train_gpt.py --steps 60 --batch-size 8"])
def test_our_trainings_run_on_the_gpu_and_go_on_where_they_were(client, command: str) -> None:
    command = f"{sys.executable} {command} --checkpoint-every 10"
    options = {"num_gpus": 1, "working_dir": JOBS}
    calm = client.submit(command, **options)
    assert calm.wait(180).status == "SUCCEEDED", calm.logs()
    slow_at_first = f"[ $RM_ATTEMPT = $RM_JOB_ID.1 ] && delay=0.1; exec {command} --step-delay ${{delay:-0}}"
    shaken = client.submit(slow_at_first, **options)
    wait_until(lambda: shaken.progress.get("step", 0) > 20, 60, "it is past its second checkpoint")
    mark = f"{client.ledger_key}-{shaken.id}.1-0"
    (on_it,) = [each for each in driver().processes if each.owner == mark]
    os.kill(runner_pid(client, shaken), 9)
    assert shaken.wait(180).status == "SUCCEEDED", shaken.logs()
    assert on_it.memory_bytes > 0
    assert re.search(r"resumed at step (\d+) of", shaken.logs(rank=0))
    assert learnt(shaken) == learnt(calm)


def learnt(job: Any) -> str:
    found = re.search(r"(final loss|weights sha256) .*", job.logs(rank=0))
    assert found, job.logs()
    return found[0]
