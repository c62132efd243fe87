"""The GCS dies, with its tables in Redis and without. Each story has a Ray, and so a process, of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from probes import actor_pids, assert_nothing_left, groups, leads, processes_with, user_processes, wait_until
from redis_world import GPUS, REDIS, WHY_NOT, Readings, RedisWorld, free_port, world

from rm.ledger import check

pytestmark = [pytest.mark.own_ray, pytest.mark.timeout(240), pytest.mark.xdist_group("gcs")]
needs_redis = pytest.mark.skipif(REDIS is None, reason=WHY_NOT)


def told(story: Callable[[Path], None], directory: Path) -> None:
    """Run the story in a process of its own: this one may be attached to another Ray. Its failure is ours."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_tell, story, directory).result()


def _tell(story: Callable[[Path], None], directory: Path) -> None:
    try:
        story(directory)
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


def waiting(gate: Path) -> str:
    """A command that goes on until the gate is there, and ends at once when it is told to."""
    return f"trap exit TERM; while [ ! -e {gate} ]; do sleep 0.05; done; echo through"


def ranks(job: Any) -> list[int]:
    """The pids of the job's processes that run its command. A child of theirs looks alike until it executes `sleep`."""
    found = processes_with("RANK", f"RM_JOB_ID={job.id}\0", command="while [ ! -e")
    return sorted(pid for pid in found if leads(pid))


HOLDER = """
import sys, time
import rm
from rm.errors import AllocatorUnavailable, LeaseLost

diary = open(sys.argv[2], "w", buffering=1)  # what is printed Ray mixes with its own
with rm.connect(sys.argv[1]).lease(num_gpus=1, ttl=8) as lease:
    print(lease.id, file=diary)
    heard = time.monotonic()
    while True:
        try:
            lease.options()
            heard = time.monotonic()
        except AllocatorUnavailable:
            pass
        except LeaseLost as error:
            print(f"{time.monotonic() - heard:.1f} {error}", file=diary)
            break
        time.sleep(0.2)
print("through", file=diary)
"""
"""A program that has a lease until it learns that it has it no more."""


def rmctl(*words: str, address: str) -> subprocess.CompletedProcess[str]:
    code, env = "from rm.cli import main; main()", {**os.environ, "RAY_ADDRESS": address}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def charged(client: Any) -> float:
    return sum(node.charged_gpus for node in client.nodes())


def group_nodes(*jobs: Any) -> dict[str, set[str]]:
    """The jobs' groups by Ray's table: id → nodes."""
    from ray.util.placement_group import placement_group_table

    ids = tuple(f"/{job.id}.1" for job in jobs)
    return {
        entry["placement_group_id"]: set(entry["bundles_to_node_id"].values())
        for entry in placement_group_table().values()
        if entry["name"].endswith(ids) and entry["state"] == "CREATED"
    }


def kinds(client: Any) -> list[str]:
    return [event.kind for event in client.events(limit=100_000)]


def in_order(each: RedisWorld, *, scratch: bool = True) -> None:
    """Nothing is left, nothing was found, and the history is one that can be."""
    assert each.client.audit().recent == ()
    wait_until(lambda: charged(each.client) == 0, 20, "nothing is charged")
    if scratch:
        assert_nothing_left(each.client)
    wait_until(lambda: not groups(), 20, "what was kept warm is gone")
    assert not user_processes()
    assert check(each.home / "ledger.sqlite").findings == []


@needs_redis
def test_the_gcs_is_killed_and_comes_back_and_nobody_notices(tmp_path: Path) -> None:
    told(killed_and_back, tmp_path)


def killed_and_back(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads, world(tmp_path) as here:
        client, gate = here.client, tmp_path / "gate"
        gang = client.submit(waiting(gate), nodes=2, gpus_per_node=1)
        doomed = client.submit(waiting(tmp_path / "never"), num_gpus=1)
        wait_until(lambda: gang.status == doomed.status == "RUNNING", 60, "both run")
        with client.lease(num_gpus=1) as lease:
            whole = client.submit("echo whole", num_gpus=GPUS)
            before, allocator = ranks(gang), client.hello()["pid"]
            assert len(before) == 2
            live = group_nodes(gang, lease.job)
            with Readings(live) as readings:
                # In flight when it dies, and while it is away: both need the ledger, and no table of Ray's.
                late = [
                    threads.submit(client.submit, f"echo {n}", num_gpus=1, name=f"late-{n}") for n in range(4)
                ]
                here.kill_gcs()
                late.append(threads.submit(client.submit, "echo 4", num_gpus=1, name="late-4"))
                late_jobs = [each.result(30) for each in late]
                assert doomed.cancel().status in ("STOPPING", "CANCELLED")
                wait_until(lambda: not ranks(doomed), 10, "what is cancelled ends before its end is booked")
                here.start_gcs()
                back_at = time.monotonic()
                assert doomed.wait(120).status == "CANCELLED"
                wait_until(lambda: readings.all_heard_since(back_at), 20, "all have reported to the new GCS")
                assert (ranks(gang), client.hello()["pid"]) == (before, allocator), "the very same processes"
                assert group_nodes(gang, lease.job) == live
                assert gang.status == lease.job.status == "RUNNING"
                assert client.audit().findings == ()
            assert readings.wrong == [], readings.wrong[:3]
        gate.touch()
        assert whole.wait(120).status == "SUCCEEDED"
        assert [job.wait(120).status for job in (gang, *late_jobs)] == ["SUCCEEDED"] * 6
        assert {job.view().attempts for job in (gang, whole, *late_jobs)} == {1}
        names = sorted(job.last.name for job in client.jobs(all=True) if job.last.name.startswith("late"))
        assert names == [f"late-{n}" for n in range(5)], "each was accepted once"
        assert gang.logs(rank=0) == "through\n"
        assert "NodeLost" not in kinds(client)
        in_order(here)


@needs_redis
@pytest.mark.long
def test_what_dies_while_the_gcs_is_away_is_known_when_it_is_back(tmp_path: Path) -> None:
    told(deaths_meanwhile, tmp_path)


def deaths_meanwhile(tmp_path: Path) -> None:
    """Ten seconds without a GCS, in which the allocator, the store and a runner are killed."""
    with ThreadPoolExecutor() as threads, world(tmp_path) as here:
        client, gate = here.client, tmp_path / "gate"
        counts = client.submit(
            f"i=0; while [ ! -e {gate} ]; do echo $((i=i+1)); sleep 0.05; done", num_gpus=1
        )
        hit = client.submit(f"[ $RM_ATTEMPT = $RM_JOB_ID.2 ] || {{ {waiting(gate)}; }}", num_gpus=1)
        wait_until(lambda: counts.status == hit.status == "RUNNING" and counts.logs(), 60, "both run")
        with client.lease(num_gpus=1) as lease:
            queued = client.submit("echo queued", num_gpus=2)
            pids, key = actor_pids(), client.ledger_key
            here.kill_gcs()
            for name in ("allocator", "store", f"rm/{key}/{hit.id}.1/0"):
                os.kill(pids[name], signal.SIGKILL)
            # Nobody answers. The call is made again when somebody does, with its key: it is one job.
            late = threads.submit(client.submit, "echo late", num_gpus=1, name="late")
            back_at = time.monotonic() + 10
            assert ranks(counts), "it goes on"
            ran = rmctl("ls", address=here.address)
            assert (ran.returncode, "nothing listens there" in ran.stderr) == (3, True), ran.stderr
            time.sleep(max(0.0, back_at - time.monotonic()))
            here.start_gcs()
            assert late.result(60).wait(120).status == "SUCCEEDED"
            view = hit.wait(120)
            assert (view.status, view.attempts, view.infra_failures) == ("SUCCEEDED", 2, 1)
            assert lease.job.status == "RUNNING", "a holder is given its whole time again"
            assert counts.view().attempts == 1
            gate.touch()
            assert counts.wait(120).status == "SUCCEEDED"
        assert queued.wait(120).status == "SUCCEEDED"
        lines = counts.logs().split()
        assert lines == [str(n) for n in range(1, len(lines) + 1)], "no line is lost, and none is there twice"
        assert len(client.jobs(all=True)) == 5
        joined = [event.body["node_id"] for event in client.events() if event.kind == "NodeJoined"]
        assert len(joined) == len(set(joined)) == 2, (
            "an allocator that finds what is known does not tell it again"
        )
        assert "NodeLost" not in kinds(client)
        in_order(here)


@needs_redis
@pytest.mark.long
def test_a_head_that_is_replaced_finds_the_jobs_of_the_nodes_that_went_on(tmp_path: Path) -> None:
    told(another_head, tmp_path)


def another_head(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        gate = tmp_path / "gate"
        gang = here.client.submit(waiting(gate), nodes=2, gpus_per_node=2)
        queued = here.client.submit("echo queued", num_gpus=GPUS)
        wait_until(lambda: gang.status == "RUNNING", 60, "it runs")
        before, live = ranks(gang), group_nodes(gang)
        assert len(before) == 2
        here.kill_head()
        here.start_head()
        here.connect()
        client = here.client
        assert (client.job(gang.id).status, client.job(queued.id).status) == ("RUNNING", "QUEUED")
        assert (ranks(gang), group_nodes(gang)) == (before, live)
        assert charged(client) == GPUS
        gate.touch()
        for job in (gang, queued):
            view = client.job(job.id).wait(120)
            assert (view.status, view.attempts) == ("SUCCEEDED", 1)
        assert client.job(gang.id).logs(rank=0) == "through\n"
        in_order(here)


@pytest.mark.long
def test_without_redis_a_new_ray_goes_on_from_the_ledger(tmp_path: Path) -> None:
    told(a_new_ray, tmp_path)


def a_new_ray(tmp_path: Path) -> None:
    """The head dies, a worker's raylet lives on and looks for it. The Ray that comes never heard of it."""
    home, tries, gate = tmp_path / "home", tmp_path / "tries", tmp_path / "gate"
    old = RedisWorld(home, None)
    client = old.client
    ended = client.submit("echo done", num_gpus=1)
    assert ended.wait(120).status == "SUCCEEDED"
    saved = "$RM_CHECKPOINT_DIR/saved"
    script = f"cat {saved}; echo $RM_ATTEMPT $$ >> {tries}; echo kept > {saved}; {waiting(gate)}"
    running = client.submit(script, num_gpus=1)
    lease = client.submit(waiting(tmp_path / "never"), num_gpus=1, attach=True)
    diary = tmp_path / "diary"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, old.address, str(diary)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    held = wait_until(lambda: diary.exists() and diary.read_text().strip(), 60, "somebody else has a lease")
    queued = client.submit("echo queued", num_gpus=GPUS)
    wait_until(lambda: running.status == lease.status == "RUNNING" and tries.exists(), 60, "both run")
    worker = next(node for node in client.nodes() if node.gpus)
    client.cordon(worker.id, reason="a fan is loud")
    first = int(tries.read_text().split()[1])
    submitted = running.view().submitted_at
    old.kill_head()
    raylet = old.worker.all_processes["raylet"][0].process
    old.head["num_gpus"] = GPUS
    old.head["gcs_server_port"] = free_port()
    old.start_head()
    try:
        assert raylet.poll() is None, "the old worker still looks for its head"
        assert Path(f"/proc/{first}").exists(), "and what ran there still runs"
        old.connect()
        client = old.client
        (node,) = client.nodes(gone=True)
        assert node.id != worker.id
        assert (node.status, node.cordon["reason"]) == ("cordoned", "a fan is loud"), "as the machine was"
        wait_until(lambda: client.job(running.id).status == "QUEUED", 30, "its attempt is lost")
        assert not Path(f"/proc/{first}").exists(), "before it is queued again"
        assert client.job(lease.id).wait(120).status == "CANCELLED", "its holder is gone"
        assert client.job(held).wait(120).status == "FAILED", "its holder is not, but what he held is"
        wait_until(
            lambda: "through" in diary.read_text(), 30, "he knows, and his block ends without an allocator"
        )
        learnt_s, _, why = diary.read_text().splitlines()[1].partition(" ")
        assert f"lease {held}: the allocator has not answered" in why, why
        assert float(learnt_s) < 8 + 4, "within its time-to-live, and the pause before"
        assert client.uncordon(node.name)[0].status == "ready"
        gate.touch()
        view = client.job(running.id).wait(120)
        assert (view.status, view.attempts, view.infra_failures) == ("SUCCEEDED", 2, 1)
        assert view.submitted_at == submitted
        assert client.job(running.id).logs() == "kept\nthrough\n"
        assert client.job(queued.id).wait(120).status == "SUCCEEDED"
        assert client.job(ended.id).logs() == "done\n"
        assert len(client.jobs(all=True)) == 5
        assert kinds(client).count("NodeLost") == 2
        # What the old runners leave in /tmp is removed by the next job there after they have ended.
        in_order(old, scratch=False)
    finally:
        holder.kill()  # by now Ray may have ended it, or not
        holder.wait()
        old.close()
