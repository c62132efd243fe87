"""What one job leaves warm is the next one's, and nothing else of it is."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from probes import actor_pids, groups, runner_pid, scratch_names, wait_until

pytestmark = pytest.mark.ray
HERE = {"num_gpus": 2, "gpu_type": "H100"}


def ended(job: Any) -> Any:
    view = job.wait(120)
    assert view.status == "SUCCEEDED", view
    return view


def stand_of(job: Any) -> str:
    """The attempt that the job's group was made for, by the ledger."""
    (ready,) = [each for each in job.events() if each.kind == "PlacementReady"]
    return ready.body["stand"] or f"{job.id}.1"


def cold(client: Any) -> bool:
    return not any(node.warm for node in client.nodes())


def test_the_next_of_the_kind_takes_over_group_and_runner_and_nothing_of_the_job(client) -> None:
    wait_until(lambda: cold(client), 20, "nothing is warm")
    look = "echo ${LEFT:-unset} $RM_JOB_ID $(dirname $RM_REPORT_FILE) $(ls $(dirname $RM_REPORT_FILE))"
    leave = "export LEFT=1; echo x > $(dirname $RM_REPORT_FILE)/left; (setsid sleep 1000 &)"
    first = client.submit(f"{look}; {leave}", **HERE)
    second = client.submit(look, after=[first.id], **HERE)
    ended(first)
    ended(second)
    assert stand_of(second) == stand_of(first)
    before, after = first.logs().split(), second.logs().split()
    assert (before[:2], after[:2]) == (["unset", first.id], ["unset", second.id])
    assert before[2] != after[2], "it has a directory of its own"
    assert "left" not in after
    warm = [node for node in client.nodes() if node.warm]
    assert [(node.warm, node.warm_gpus, node.charged_gpus) for node in warm] == [
        ({stand_of(second): 2}, 2, 0)
    ]
    assert warm[0].free_gpus == 8, "what is warm is free"


def test_whatever_ran_there_before_a_log_is_the_jobs_own_and_its_directory_empty(client) -> None:
    work = "$(dirname $RM_REPORT_FILE)/work"
    leave, look = f"seq 100 >&2; touch {work}/left", f"ls -A {work} && echo empty"
    lines = ["seq 5000", "echo short", leave, look, "seq 300"]
    jobs: list[Any] = []
    for line in lines:
        jobs.append(client.submit(line, **HERE, after=[job.id for job in jobs[-1:]]))
    for job in jobs:
        ended(job)
    assert len({stand_of(job) for job in jobs}) == 1
    assert jobs[0].logs().split() == [str(n) for n in range(1, 5001)]
    assert jobs[1].logs() == "short\n"
    assert jobs[2].logs().split() == [str(n) for n in range(1, 101)]
    assert jobs[3].logs() == "empty\n"
    assert jobs[4].logs().split() == [str(n) for n in range(1, 301)]


def test_another_shape_and_a_lease_do_not(client) -> None:
    first = client.submit("true", **HERE)
    ended(first)
    larger = client.submit("true", num_gpus=8, gpu_type="H100")
    ended(larger)
    assert stand_of(larger) == f"{larger.id}.1", "and the GPUs came back for it"
    with client.lease(num_gpus=8, gpu_type="H100", timeout=30) as lease:
        assert stand_of(lease.job) == f"{lease.job.id}.1"


def test_what_a_warm_runner_keeps_goes_with_it(client) -> None:
    first = client.submit("sleep 0.5", **HERE)
    wait_until(lambda: first.status == "RUNNING", what="it runs")
    spare = f"spare-{runner_pid(client, first)}"
    ended(first)
    wait_until(lambda: spare in scratch_names(), 5, "its directory is kept, emptied")
    wait_until(lambda: cold(client), 20, "nothing is warm")
    wait_until(lambda: spare not in scratch_names(), 5, "it went with the runner")


def test_a_runner_that_died_while_it_was_warm_costs_the_next_job_nothing(client) -> None:
    first = client.submit("sleep 0.5", **HERE)
    wait_until(lambda: first.status == "RUNNING", what="it runs")
    pid = runner_pid(client, first)
    second = client.submit(f"kill -9 {pid}; sleep 0.2", num_gpus=1, gpu_type="H100", after=[first.id])
    third = client.submit("true", **HERE, after=[second.id])
    ended(second)
    assert ended(third).attempts == 1
    assert ended(third).infra_failures == 0


def imported() -> tuple[bool, str]:
    import sys

    already = "numpy" in sys.modules
    import numpy

    print(f"numpy {numpy.__version__}")
    return already, os.environ["RM_JOB_ID"]


def test_a_function_finds_imported_what_the_last_one_imported(client) -> None:
    def preloaded() -> bool:
        job = client.submit(imported, **HERE)
        already, told = job.result(60)
        assert told == job.id
        assert job.logs().startswith("numpy ")
        assert job.view().attempts == 1
        return already

    assert not preloaded(), "nobody has imported it there"
    wait_until(preloaded, 40, "an interpreter has it, and the functions come from there")


def test_a_restarted_allocator_finds_the_job_that_took_over(client) -> None:
    first = client.submit("sleep 0.2", **HERE)
    second = client.submit("sleep 3", **HERE, after=[first.id])
    wait_until(lambda: second.status == "RUNNING", 40, "it runs")
    stand = second.view().stand
    assert stand == stand_of(first)
    os.kill(actor_pids()["allocator"], signal.SIGKILL)
    view = ended(second)
    assert (view.attempts, view.infra_failures) == (1, 0)
    assert f"rm/{client.ledger_key}/{stand}" in groups(), "and it was kept once more"


def test_a_restarted_allocator_removes_what_was_warm(client) -> None:
    ended(client.submit("true", **HERE))
    assert not cold(client)
    os.kill(actor_pids()["allocator"], signal.SIGKILL)
    wait_until(lambda: not groups(), 20, "the group that nobody has is gone")
