"""The GCS dies, with its tables in Redis and without. Each story has a Ray, and so a process, of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from probes import assert_nothing_left, processes_with, wait_until
from redis_world import GPUS, REDIS, WHY_NOT, Readings, RedisWorld, world

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
    """The pids of the job's processes that run its command."""
    return sorted(processes_with("RANK", f"RM_JOB_ID={job.id}\0", command="trap exit"))


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


def in_order(each: RedisWorld) -> None:
    """Nothing is left, nothing was found, and the history is one that can be."""
    assert each.client.audit().recent == ()
    wait_until(lambda: charged(each.client) == 0, 20, "nothing is charged")
    assert_nothing_left(each.client)
    assert check(each.home / "ledger.sqlite").findings == []


@needs_redis
def test_the_gcs_is_killed_and_comes_back_and_nobody_notices(tmp_path: Path) -> None:
    told(killed_and_back, tmp_path)


def killed_and_back(tmp_path: Path) -> None:
    with world(tmp_path) as here, ThreadPoolExecutor() as threads:
        client, gate = here.client, tmp_path / "gate"
        gang = client.submit(waiting(gate), nodes=2, gpus_per_node=1)
        doomed = client.submit(waiting(tmp_path / "never"), num_gpus=1)
        wait_until(lambda: gang.status == doomed.status == "RUNNING", 60, "both run")
        with client.lease(num_gpus=1) as lease:
            whole = client.submit("echo whole", num_gpus=GPUS)
            before, allocator = ranks(gang), client.hello()["pid"]
            assert len(before) == 2
            live = group_nodes(gang, lease.job)
            readings = Readings(live)
            # In flight when it dies, and handed in while it is away: both need the ledger, and no table of Ray's.
            late = [
                threads.submit(client.submit, f"echo {n}", num_gpus=1, name=f"late-{n}") for n in range(4)
            ]
            here.kill_gcs()
            readings.start()
            late.append(threads.submit(client.submit, "echo 4", num_gpus=1, name="late-4"))
            late_jobs = [each.result(30) for each in late]
            assert doomed.cancel().status == "STOPPING"
            assert charged(client) == GPUS, "a job's GPUs are its own until they are seen free"
            here.start_gcs()
            assert doomed.wait(60).status == "CANCELLED"
            wait_until(lambda: readings.unheard, 20, "a reading in which no node has reported yet")
            assert (ranks(gang), client.hello()["pid"]) == (before, allocator), "the very same processes"
            assert group_nodes(gang, lease.job) == live
            assert gang.status == lease.job.status == "RUNNING"
            assert client.audit().findings == ()
            readings.stop()
            assert readings.wrong == []
        gate.touch()
        assert whole.wait(60).status == "SUCCEEDED"
        assert [job.wait(60).status for job in (gang, *late_jobs)] == ["SUCCEEDED"] * 6
        assert {job.view().attempts for job in (gang, whole, *late_jobs)} == {1}
        names = sorted(job.last.name for job in client.jobs(all=True) if job.last.name.startswith("late"))
        assert names == [f"late-{n}" for n in range(5)], "each was accepted once"
        assert gang.logs(rank=0) == "through\n"
        assert "NodeLost" not in kinds(client)
        in_order(here)
