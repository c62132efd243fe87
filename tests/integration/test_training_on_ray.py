"""Real training through the allocator: our own jobs, and scripts that the repository has never seen."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from probes import runner_pid, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.torch]

REPO = Path(__file__).resolve().parents[2]


def test_a_training_whose_runner_is_killed_ends_as_if_it_had_not_been(client) -> None:
    command = "python jobs/train_chars.py --steps 200 --checkpoint-every 10"
    options = {"num_gpus": 2, "nproc_per_node": "gpu", "working_dir": REPO}
    calm = client.submit(command, **options)
    slow_at_first = f"[ $RM_ATTEMPT = $RM_JOB_ID.1 ] && delay=0.2; exec {command} --step-delay ${{delay:-0}}"
    shaken = client.submit(slow_at_first, **options)
    wait_until(lambda: shaken.progress.get("step", 0) > 20, 60, "it has trained past its second checkpoint")
    os.kill(runner_pid(client, shaken), signal.SIGKILL)
    view = shaken.wait(120)
    assert (view.status, view.attempts, view.infra_failures) == ("SUCCEEDED", 2, 1)
    assert calm.wait(120).status == "SUCCEEDED"
    assert calm.progress["step"] == calm.progress["total"] == 200
    assert re.search(r"resumed at step (\d+) of 200", shaken.logs(rank=0))
    assert learnt(shaken) == learnt(calm)


def learnt(job) -> str:
    return re.search(r"final loss .*", job.logs(rank=0))[0]


def test_a_plain_ddp_script_over_two_nodes(client, tmp_path: Path) -> None:
    (tmp_path / "ddp.py").write_text(
        textwrap.dedent("""
        import os, torch, torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 4) * (dist.get_rank() + 1)).mean().backward()
            optimizer.step()
        total = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(total)
        print("sum of ranks", int(total), "local rank", os.environ["LOCAL_RANK"])
        dist.barrier()  # gloo's threads may abort a process whose peer has gone already
        dist.destroy_process_group()
        """)
    )
    job = client.submit("python ddp.py", nodes=2, gpus_per_node=8, nproc_per_node=1, working_dir=tmp_path)
    assert job.wait(120).status == "SUCCEEDED", job.logs()
    assert job.logs(rank=1) == "sum of ranks 1 local rank 0\n"


def test_rmctl_run_streams_and_passes_the_exit_code_on(ray_cluster, client) -> None:
    rmctl = [str(Path(sys.executable).parent / "rmctl"), "--address", ray_cluster.address]
    good = subprocess.run(
        [*rmctl, "run", "--num-gpus", "1", "--", "sh", "-c", "echo hello; exit 0"],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (good.returncode, good.stdout) == (0, "hello\n"), good.stderr
    bad = subprocess.run(
        [*rmctl, "run", "--num-gpus", "1", "--", "sh", "-c", "echo bad >&2; exit 7"],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert bad.returncode == 7
    assert "exited with code 7" in bad.stderr


def test_ctrl_c_on_rmctl_run_cancels(ray_cluster, client) -> None:
    rmctl = [str(Path(sys.executable).parent / "rmctl"), "--address", ray_cluster.address]
    child = subprocess.Popen(
        [*rmctl, "run", "--num-gpus", "1", "--name", "stop-me", "--", "sleep", "1000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    job = wait_until(lambda: client.jobs(name="stop-me"), 60, "the job is there")[0]
    wait_until(lambda: job.status == "RUNNING", what="it runs")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert job.status == "CANCELLED"
