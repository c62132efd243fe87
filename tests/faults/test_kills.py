"""Things that really die, by their own pid: the allocator, a runner, the store, a node."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from probes import actor_pids, leads, runner_pid, user_processes, wait_until

from rm.errors import AllocatorUnavailable

pytestmark = pytest.mark.ray


def processes_of(job_id: str) -> list[int]:
    """The job's rank processes: each leads a session, and what it starts in turn does not."""
    found = []
    for pid in user_processes():
        words = environ(pid)
        if words.get("RM_JOB_ID") == job_id and "RANK" in words and leads(pid):
            found.append(pid)
    return found


def environ(pid: int) -> dict[str, str]:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def test_the_allocator_is_killed_and_running_jobs_do_not_notice(client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    running = client.submit(
        f"while [ ! -e {gate} ]; do sleep 0.05; done; echo done", nodes=3, gpus_per_node=8
    )
    queued = client.submit("echo second", nodes=3, gpus_per_node=8)
    wait_until(lambda: running.status == "RUNNING", what="it runs")
    before = processes_of(running.id)
    anchor = Path(client.hello()["home"], "clock.json")
    life = json.loads(anchor.read_text())["life"]
    for _ in range(2):
        pid = client.hello()["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: client.hello()["pid"] != pid, 20, "the allocator is back")
        assert running.status == "RUNNING"
        assert queued.status == "QUEUED"
        assert processes_of(running.id) == before, "the very same processes go on"
        assert json.loads(anchor.read_text())["life"] == life, "and the same clock"
    assert sum(node.charged_gpus for node in client.nodes()) == 24
    gate.touch()
    assert running.wait(120).status == "SUCCEEDED"
    assert running.logs(rank=0) == "done\n"
    assert queued.wait(120).status == "SUCCEEDED"
    assert running.view().attempts == queued.view().attempts == 1


def test_the_allocator_is_killed_while_gpus_are_reserved_and_released(client, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    jobs = client.submit_many([f"echo {number} >> {ran}" for number in range(12)], num_gpus=4)
    for _ in range(3):
        time.sleep(0.4)
        os.kill(client.hello()["pid"], signal.SIGKILL)
    for job in jobs:
        assert job.wait(120).status == "SUCCEEDED"
    # Not the attempts: on a crowded machine a group may not be ready in time, and then another one is made.
    assert sorted(map(int, ran.read_text().split())) == list(range(12)), "each has run once"


def test_a_killed_runner_loses_its_processes_and_the_job_is_tried_again(client, tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/tries; (setsid sleep 1000 &); [ $(wc -l < {tmp_path}/tries) = 2 ] || sleep 1000"
    job = client.submit(script, num_gpus=1)
    wait_until(lambda: job.status == "RUNNING", what="it runs")
    first = wait_until(lambda: processes_of(job.id), what="its processes")
    os.kill(runner_pid(client, job), signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in first), 10, "its processes are gone")
    view = job.wait(120)
    assert (view.status, view.attempts, view.infra_failures) == ("SUCCEEDED", 2, 1)


def test_a_killed_runner_stops_its_whole_gang(client) -> None:
    job = client.submit("sleep 1000", nodes=2, gpus_per_node=8, max_infra_retries=0, grace=1)
    wait_until(lambda: job.status == "RUNNING", what="it runs")
    os.kill(runner_pid(client, job, 1), signal.SIGKILL)
    view = job.wait(120)
    assert view.status == "FAILED"
    assert view.outcome["infra"]
    wait_until(lambda: not user_processes(), 5, "its keeper has ended what the dead runner had started")


def test_a_runner_that_dies_in_starting_beside_the_allocator_is_not_made_anew(client) -> None:
    """Whether its code had begun only RunStarted would have told. Under the same attempt it could run twice."""
    job = client.submit(int, "17", num_gpus=1, hold=True, max_infra_retries=0)
    # It waits for its function: so it stays where it starts.
    store = actor_pids()["store"]
    os.kill(store, signal.SIGSTOP)
    try:
        job.release()
        wait_until(
            lambda: job.view().stand and f"rm/{client.ledger_key}/{job.view().stand}/0" in actor_pids()
        )
        assert job.status == "RESERVING"
        runner, allocator = runner_pid(client, job), client.hello()["pid"]
        os.kill(allocator, signal.SIGKILL)
        os.kill(runner, signal.SIGKILL)
        wait_until(lambda: client.hello()["pid"] != allocator, 20, "the allocator is back")
        wait_until(lambda: job.view().attempts == 2, 30, "it is tried anew")
    finally:
        os.kill(store, signal.SIGCONT)
    assert job.result(60) == 17
    view = job.view()
    assert (view.attempts, view.infra_failures, view.failures) == (2, 0, 0), "and that costs no retry"


def test_a_runner_that_has_to_go_ends_what_it_runs_first(client) -> None:
    """Of an attempt that was given up: when its runner has answered, nobody is left who could use the GPU."""
    import ray

    job = client.submit("trap '' TERM; sleep 60", num_gpus=1, grace=30)
    wait_until(lambda: processes_of(job.id) and job.status == "RUNNING", what="it runs")
    runner = ray.get_actor(f"rm/{client.ledger_key}/{job.view().stand}/0", namespace="rm")
    assert ray.get(runner.hand_in.remote(), timeout=60) == []
    assert not user_processes()
    assert job.wait(60).outcome["signal"] == 9


def test_gpus_do_not_wait_for_a_store_that_is_away(client) -> None:
    """The ends of logs are in the runner's memory, and the runner has to go to make room for another kind of job."""
    first = client.submit("echo the last words", num_gpus=1, gpu_type="H100")
    wait_until(lambda: first.view().ended, what="it has ended")
    store = actor_pids()["store"]
    os.kill(store, signal.SIGSTOP)
    try:
        other = client.submit("sleep 60", num_gpus=8, gpu_type="H100")
        wait_until(lambda: other.status == "RUNNING", 5, "the other kind runs")
    finally:
        os.kill(store, signal.SIGCONT)
    assert first.logs() == "the last words\n"
    other.cancel()


def test_the_store_is_killed_and_no_line_is_lost(client) -> None:
    job = client.submit("for i in $(seq 200); do echo $i; sleep 0.01; done", num_gpus=1)
    wait_until(lambda: job.logs(), what="it prints")
    os.kill(actor_pids()["store"], signal.SIGKILL)
    assert job.wait(120).status == "SUCCEEDED"
    assert job.logs() == "".join(f"{i}\n" for i in range(1, 201))


def test_an_allocator_that_is_stopped_and_started_again_finds_its_running_jobs(
    ray_cluster, client, tmp_path
) -> None:
    import rm

    def work(gate: str) -> str:
        import time
        from pathlib import Path

        print("before", flush=True)
        while not Path(gate).exists():
            time.sleep(0.05)
        print("after", flush=True)
        return "the result"

    gate = tmp_path / "gate"
    job = client.submit(work, str(gate), num_gpus=1)
    wait_until(lambda: job.logs() == "before\n", what="it prints")
    client.stop_allocator(keep_jobs=True)
    with pytest.raises(AllocatorUnavailable, match="rmctl start"):
        client.jobs()
    gate.touch()
    time.sleep(1)
    rm.connect(config=ray_cluster.config)
    assert job.result(60) == "the result", "the old handle finds the new allocator by its name"
    assert job.logs() == "before\nafter\n"
    assert job.view().attempts == 1


def test_a_dead_node_loses_its_attempt_once_and_the_gang_runs_elsewhere(ray_cluster, client) -> None:
    extra = ray_cluster.cluster.add_node(
        num_cpus=1,
        num_gpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        labels={"spot": "yes"},
    )
    wait_until(lambda: len(client.nodes()) == 4, what="the node is seen")
    node = next(node for node in client.nodes() if node.labels.get("spot"))
    # Best fit puts a 2-GPU job on the 2-GPU node.
    job = client.submit("echo $RM_ATTEMPT; [ $RM_ATTEMPT = $RM_JOB_ID.2 ] || sleep 1000", num_gpus=2)
    wait_until(lambda: job.status == "RUNNING", what="it runs")
    assert job.view().nodes == (node.name,)
    wait_until(job.logs, what="its first line is in the store")
    ray_cluster.cluster.remove_node(extra, allow_graceful=False)
    view = job.wait(120)
    assert (view.status, view.attempts, view.infra_failures) == ("SUCCEEDED", 2, 1)
    assert len(client.nodes()) == 3
    chunk = job._store("read_log", 1, 0, "out", 0, 1000)
    assert chunk.data == f"{job.id}.1\n".encode(), "the log of the first attempt outlives its node"
