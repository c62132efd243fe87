"""The main job on a real Ray: request, queue, allocate, run, release, the next one starts."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest
from probes import cold_groups, user_processes, wait_until

import rm
from rm.errors import JobFailed, LeaseLost

pytestmark = pytest.mark.ray


def test_a_function_gets_gpus_runs_and_returns_its_result(client) -> None:
    def work(a: int, *, b: int) -> dict:
        return {
            "sum": a + b,
            "visible": os.environ["CUDA_VISIBLE_DEVICES"],
            "job": os.environ["RM_JOB_ID"],
        }

    job = client.submit(work, 2, kwargs={"b": 3}, num_gpus=2)
    result = job.result(60)
    assert result["sum"] == 5
    assert len(result["visible"].split(",")) == 2
    assert result["job"] == job.id
    assert job.status == "SUCCEEDED"


def test_a_command_runs_and_its_logs_outlive_it(client) -> None:
    job = client.submit("echo out; echo err >&2; echo $RM_JOB_ID", num_gpus=1)
    view = job.wait(120)
    assert view.status == "SUCCEEDED"
    assert job.logs(stream="out") == f"out\n{job.id}\n"
    assert job.logs(stream="err") == "err\n"


def test_the_second_waits_until_the_first_has_released(client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = client.submit(f"while [ ! -e {gate} ]; do sleep 0.05; done", nodes=3, gpus_per_node=8)
    wait_until(lambda: first.status == "RUNNING", what="the first runs")
    second = client.submit("true", nodes=3, gpus_per_node=8)
    assert second.status == "QUEUED"
    assert second.why()["code"] == "WaitingForCapacity"
    assert second.why()["evidence"]["free_gpus"] == 0
    assert sum(node.charged_gpus for node in client.nodes()) == 24
    assert len(cold_groups(client)) == 1
    gate.touch()
    assert first.wait(120).status == "SUCCEEDED"
    assert second.wait(120).status == "SUCCEEDED"
    kinds = [event.kind for event in second.events()]
    assert kinds == [
        "JobSubmitted", "AvailabilityChecked", "AvailabilityChecked", "JobAdmitted", "PlacementReady", "RunStarted",
        "RunExited", "PlacementReleased",
    ]  # fmt: skip
    admitted = second.events()[3]
    assert (admitted.free_before, admitted.free_after, admitted.charged_after) == (24, 0, 24)
    assert [e.at for e in second.events()] == sorted(e.at for e in second.events())
    released = [e for e in first.events() if e.kind == "PlacementReleased"]
    assert admitted.at >= released[0].at, "the second was admitted only after the first's release was seen"


def test_torchrun_variables_over_two_nodes(client) -> None:
    script = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $GROUP_RANK $MASTER_PORT $CUDA_VISIBLE_DEVICES"'
    job = client.submit(script, nodes=2, gpus_per_node=8, nproc_per_node=2)
    assert job.wait(120).status == "SUCCEEDED"
    lines = [job.logs(rank=rank).split() for rank in range(4)]
    assert [line[0] for line in lines] == ["0", "1", "2", "3"]
    assert [line[1] for line in lines] == ["0", "1", "0", "1"]
    assert all(line[2:4] == ["4", "2"] for line in lines)
    assert [line[4] for line in lines] == ["0", "0", "1", "1"]
    assert len({line[5] for line in lines}) == 1
    assert all(line[6] == "0,1,2,3,4,5,6,7" for line in lines), "every process of a node sees all its GPUs"


def test_nproc_per_gpu_and_environment(client) -> None:
    job = client.submit(
        ["sh", "-c", "echo $LOCAL_RANK of $LOCAL_WORLD_SIZE, $GREETING"],
        num_gpus=3,
        nproc_per_node="gpu",
        env={"GREETING": "hello"},
    )
    assert job.wait(120).status == "SUCCEEDED"
    assert sorted(job.logs().splitlines()) == [f"[rank {r}] {r} of 3, hello" for r in range(3)]


def test_working_dir_is_shipped_by_value(client, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("ANSWER = 42\n")
    (tmp_path / "main.py").write_text(
        "import helper, os\nprint(helper.ANSWER, os.path.exists('ignored.bin'))\n"
    )
    (tmp_path / "ignored.bin").write_text("x")
    (tmp_path / ".gitignore").write_text("*.bin\n")
    script = tmp_path / "run.sh"
    script.write_text("#!/bin/sh\nexec python main.py\n")
    script.chmod(0o755)
    job = client.submit(["./run.sh"], num_gpus=1, working_dir=tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    assert job.wait(120).status == "SUCCEEDED"
    assert job.logs() == "42 False\n"


def test_pip_packages_of_a_runtime_env_are_there_or_the_job_tells_which_is_not(
    client, tmp_path: Path
) -> None:
    # First, so that both virtual environments are made at the same time.
    missing = client.submit("true", num_gpus=1, runtime_env={"pip": ["no-such-package-of-ours==1.2.3"]})
    wheel = tmp_path / "tiny_wheel_of_ours-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "tiny_wheel_of_ours-1.0.dist-info"
        archive.writestr("tiny_wheel_of_ours.py", "WORD = 'installed'\n")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel-of-ours\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    command = "python -c 'import tiny_wheel_of_ours; print(tiny_wheel_of_ours.WORD)'"
    job = client.submit(command, num_gpus=1, runtime_env={"pip": [str(wheel)]})
    assert job.wait(120).status == "SUCCEEDED", job.view().outcome
    assert job.logs() == "installed\n"
    view = missing.wait(150)
    assert view.status == "FAILED"
    assert "runtime_env" in view.outcome["message"]
    assert "no-such-package-of-ours" in view.outcome["message"]


def test_reports_checkpoint_dir_and_should_stop(client) -> None:
    def train() -> tuple[bool, str]:
        import time

        import rm

        rm.should_stop()
        rm.checkpoint_dir().joinpath("mark").write_text("here")
        for step in range(1000):
            rm.report(step=step, total=1000, loss=1 / (step + 1))
            if rm.should_stop():
                return True, str(rm.checkpoint_dir())
            time.sleep(0.05)
        return False, ""

    job = client.submit(train, num_gpus=1, name="<b>train & co</b>")
    wait_until(lambda: job.progress.get("step", 0) > 3, what="progress arrives")
    card = job._repr_html_()
    assert "<progress" in card
    assert "<b>train" not in card
    assert "&lt;b&gt;train" in card
    job.cancel()
    assert job.wait(120).status == "CANCELLED"


def test_a_failing_rank_stops_the_gang_and_is_named(client) -> None:
    script = 'if [ $RANK = 2 ]; then echo "boom on stderr" >&2; exit 3; fi; sleep 1000'
    job = client.submit(script, nodes=2, gpus_per_node=2, nproc_per_node="gpu", grace=2)
    view = job.wait(120)
    assert view.status == "FAILED"
    assert view.outcome["rank"] == 2
    assert view.outcome["exit_code"] == 3
    assert "rank 2" in view.outcome["message"]
    assert "exited with code 3" in view.outcome["message"]
    assert view.outcome["tail"] == ("boom on stderr",) or view.outcome["tail"] == ["boom on stderr"]
    with pytest.raises(JobFailed, match="boom on stderr"):
        job.result(5)


def test_an_exception_comes_back_as_it_was(client) -> None:
    def broken() -> None:
        raise ZeroDivisionError("no good")

    job = client.submit(broken, num_gpus=1)
    with pytest.raises(JobFailed, match="no good") as caught:
        job.result(60)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_time_limit_is_sigterm_grace_sigkill(client) -> None:
    obeys = client.submit(
        "trap 'echo got TERM; exit 0' TERM; while :; do sleep 0.1; done", num_gpus=1, time_limit=1
    )
    ignores = client.submit("trap '' TERM; while :; do sleep 0.1; done", num_gpus=1, time_limit=1, grace=1)
    assert obeys.wait(120).status == "TIMED_OUT"
    assert "got TERM" in obeys.logs()
    view = ignores.wait(120)
    assert view.status == "TIMED_OUT"
    assert view.outcome["signal"] == 9


def test_cancel_queued_and_running(client) -> None:
    running = client.submit("sleep 1000", nodes=3, gpus_per_node=8)
    queued = client.submit("sleep 1000", num_gpus=8)
    wait_until(lambda: running.status == "RUNNING", what="it runs")
    queued.cancel()
    assert queued.wait(120).status == "CANCELLED"
    running.cancel()
    running.cancel()
    assert running.wait(120).status == "CANCELLED"
    assert not user_processes()


def test_submit_many_is_one_step_and_all_run(client) -> None:
    jobs = client.submit_many([["echo", str(i)] for i in range(6)], num_gpus=1)
    assert [int(job.id[1:]) - int(jobs[0].id[1:]) for job in jobs] == list(range(6))
    for number, job in enumerate(jobs):
        assert job.wait(120).status == "SUCCEEDED"
        assert job.logs() == f"{number}\n"


def test_gpu_type_is_matched_by_label(client) -> None:
    job = client.submit("sleep 1000", num_gpus=8, gpu_type="H100")
    wait_until(lambda: job.status == "RUNNING", what="it runs")
    held = [node for node in client.nodes() if node.charged_gpus]
    assert [node.gpu_type for node in held] == ["H100"]
    job.cancel()
    job.wait(120)


def test_two_halves_share_a_device_and_a_third_whole_does_not(client) -> None:
    jobs = [
        client.submit("echo $CUDA_VISIBLE_DEVICES; sleep 1000", num_gpus=0.5, gpu_type="A100")
        for _ in range(2)
    ]
    for job in jobs:
        wait_until(lambda job=job: job.logs(), what="it runs")
    assert jobs[0].logs() == jobs[1].logs(), "both halves of one device"
    node = next(node for node in client.nodes() if node.gpu_type == "A100")
    assert (node.charged_gpus, node.free_gpus) == (1, 7)


def test_a_lease_serves_the_users_own_ray_tasks(client) -> None:
    import ray

    @ray.remote
    def mine() -> list[int]:
        return ray.get_gpu_ids()

    with client.lease(num_gpus=2, timeout=30) as lease:
        assert len(ray.get(mine.options(**lease.options()).remote())) == 2
        assert sum(node.charged_gpus for node in client.nodes()) == 2
        assert sum(node.foreign_gpus for node in client.nodes()) == 0, "work inside the lease is not foreign"
    assert lease.job.status == "SUCCEEDED"
    assert sum(node.charged_gpus for node in client.nodes()) == 0


def test_a_lease_that_is_over_says_so(client) -> None:
    with client.lease(num_gpus=1, timeout=30, time_limit=0.5) as lease:
        lease.options()
        wait_until(lambda: lease.job.status == "TIMED_OUT", what="its time limit ended it")
        with pytest.raises(LeaseLost, match="TIMED_OUT"):
            lease.options()


def test_capacity_that_other_ray_work_uses_is_respected(client) -> None:
    import ray

    @ray.remote(num_gpus=5, num_cpus=0)
    class Stranger:
        def here(self) -> str:
            return ray.get_runtime_context().get_node_id()

    stranger = Stranger.remote()
    node_id = ray.get(stranger.here.remote())
    wait_until(lambda: sum(n.foreign_gpus for n in client.nodes()) == 5, what="foreign use is seen")
    jobs = client.submit_many(["sleep 1000"] * 3, num_gpus=8)
    wait_until(lambda: sum(job.status == "RUNNING" for job in jobs) == 2, what="two of three run")
    assert {n.id: n.free_gpus for n in client.nodes()}[node_id] == 3
    ray.kill(stranger)
    wait_until(
        lambda: all(job.status == "RUNNING" for job in jobs), what="the third runs when the stranger is gone"
    )


def test_a_client_that_dies_loses_its_attached_job_and_lease(ray_cluster, client) -> None:
    import subprocess

    code = f"""
import rm, os, signal
client = rm.connect({ray_cluster.address!r})
client.submit("sleep 1000", num_gpus=1, name="attached", attach=True)
client.lease(num_gpus=1, name="held").__enter__()
client.submit("sleep 1000", num_gpus=1, name="detached")
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert "ready" in child.stdout
    names = lambda: {job.last.name for job in client.jobs()}  # noqa: E731
    assert names() >= {"attached", "held", "detached"}
    wait_until(lambda: names() == {"detached"}, 25, "the attached job and the lease ended")
    ended = {job.last.name: job.last for job in client.jobs(all=True, limit=10)}
    assert ended["attached"].status == "CANCELLED"
    assert "went away" in ended["attached"].outcome["message"]


def test_two_clients_at_once_get_the_same_allocator(ray_cluster, client) -> None:
    again = rm.connect()
    assert again.hello()["pid"] == client.hello()["pid"]
