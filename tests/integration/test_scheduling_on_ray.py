"""The scheduler's rules with real jobs on a real Ray: who comes first, who has to go, and who comes back."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from probes import actor_pids, user_processes, wait_until

from rm.core.policy import Policy, Preempt, QueuePolicy
from rm.errors import InvalidSpec, RequestError, UnknownJob, UnknownQueue

pytestmark = pytest.mark.ray

REPO = Path(__file__).resolve().parents[2]
WHOLE = {"nodes": 3, "gpus_per_node": 8}
"""The whole cluster."""
NODE = {"num_gpus": 8, "gpu_type": "A100"}
"""A certain node of it, whole."""
LAB = """
default_queue: vision
queues:
  vision: {nominal: 16, default_priority: 7}
  text: {nominal: 8, max_time_limit: 10m}
"""
TRAIN = "python jobs/train_digits.py --steps 80 --checkpoint-every 5"


@pytest.fixture
def rules(client) -> Iterator[Callable[[Policy], None]]:
    """Puts other rules in force for the time of one test."""

    def put(policy: Policy) -> None:
        client._allocator("apply_policy", policy, "", "the test")

    yield put
    for job in client.jobs():
        job.cancel()
        job.wait(120)
    put(Policy())


def until(gate: Path) -> str:
    """A command that runs until the file is there, and ends well when it is told to stop."""
    return f"trap 'exit 0' TERM; while [ ! -e {gate} ]; do sleep 0.05; done"


def runs(*jobs: Any) -> None:
    for job in jobs:
        wait_until(lambda job=job: job.status == "RUNNING", 40, f"{job.id} runs")


def succeeds(*jobs: Any) -> None:
    for job in jobs:
        view = job.wait(120)
        assert view.status == "SUCCEEDED", (job.id, view.outcome)


def test_higher_priorities_start_first(client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = client.submit(until(gate), **NODE)
    runs(first)
    names = ["low", "normal", "high"]
    low, normal, high = (client.submit("true", priority=name, name=name, **NODE) for name in names)
    assert [job.last.priority for job in (low, normal, high)] == [-100, 0, 100]
    assert low.why()["code"] in ("Priority", "Reserved", "WaitingForCapacity")
    gate.touch()
    succeeds(first, low, normal, high)
    began = [job.view().started_at for job in (high, normal, low)]
    assert began == sorted(began)


def test_a_queue_borrows_and_its_owner_takes_back_what_is_its_own(client, rules, tmp_path: Path) -> None:
    assert not client.apply(LAB, dry_run=True)["applied"]
    assert client.policy()["text"] == ""
    assert client.apply(LAB)["applied"]
    with pytest.raises(UnknownQueue, match="known queues: vision, text"):
        client.submit("true", num_gpus=1, queue="default")
    with pytest.raises(InvalidSpec, match="time_limit: 601 s is more than the 600 s that queue text allows"):
        client.submit("true", num_gpus=1, queue="text", time_limit=601)
    gate, owners_gate = tmp_path / "gate", tmp_path / "owners"
    stubborn = f"trap '' TERM; while [ ! -e {gate} ]; do sleep 0.05; done"
    guests = [client.submit(stubborn, num_gpus=8, queue="text", grace=1) for _ in range(3)]
    runs(*guests)
    assert guests[0].last.time_limit_s == 600, "the queue's longest"
    owner = client.submit(until(owners_gate), num_gpus=8)
    assert (owner.last.queue, owner.last.priority) == ("vision", 7)
    runs(owner)
    evicted = [job for job in guests if job.view().evictions]
    assert len(evicted) == 1, "no more than was needed"
    guest = evicted[0]
    assert guest.last.status == "QUEUED"
    assert guest.last.outcome["message"] == f"evicted for {owner.id}"
    assert guest.last.outcome["signal"] == 9, "it did not listen, so its grace ended it"
    stops = [each.body for each in guest.events() if each.kind == "StopRequested"]
    assert stops == [{"cause": "preempted", "by": owner.id}]
    second = client.submit(until(owners_gate), num_gpus=8, preemptible=False)
    runs(second)
    assert sum(job.view().evictions for job in guests) == 2
    used = {each.name: (each.nominal, each.used, each.pending) for each in client.queues()}
    assert used == {"vision": ({"*": 16}, {"*": 16}, 0), "text": ({"*": 8}, {"*": 8}, 2)}
    os.kill(actor_pids()["allocator"], signal.SIGKILL)
    third = client.submit("true", num_gpus=8)
    assert client.policy()["text"] == LAB, "the rules outlive the allocator"
    assert client.policy()["by"] == client.owner
    assert third.why()["code"] in ("WaitingForQuota", "WaitingForCapacity", "Priority")
    assert sum(job.view().status == "RUNNING" for job in guests) == 1, "8 GPUs are theirs"
    owners_gate.touch()
    gate.touch()
    succeeds(owner, second, third, *guests)
    assert [job.last.failures for job in guests] == [0, 0, 0]


def test_backfill_uses_what_waits_and_delays_nobody(client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    running = client.submit(until(gate), nodes=2, gpus_per_node=8, time_limit=60)
    runs(running)
    head = client.submit("true", **WHOLE)
    assert head.why()["code"] == "WaitingForCapacity"
    endless = client.submit("true", num_gpus=8)
    assert endless.why()["code"] == "Reserved"
    assert endless.why()["evidence"]["for"] == head.id
    short = client.submit("true", num_gpus=8, time_limit=2, grace=1)
    succeeds(short)
    assert {job.status for job in (head, endless)} == {"QUEUED"}
    gate.touch()
    succeeds(running, head, endless)
    assert short.last.started_at < head.last.started_at < endless.last.started_at


@pytest.mark.torch
def test_an_evicted_training_goes_on_and_ends_with_the_same_weights(client, rules, tmp_path: Path) -> None:
    rules(Policy({"default": QueuePolicy("default", preempt=Preempt.LOWER)}))
    gate = tmp_path / "gate"
    calm = client.submit(TRAIN, num_gpus=1, gpu_type="H100", working_dir=REPO)
    slow_at_first = f"[ -e {gate} ] && delay=0 || delay=0.5; exec {TRAIN} --step-delay $delay"
    shaken = client.submit(slow_at_first, num_gpus=8, gpu_type="A100", working_dir=REPO)
    wait_until(lambda: shaken.progress.get("step", 0) > 7, 60, "it has trained past its first checkpoint")
    wait_until(lambda: shaken.view().checkpoint_at, 5, "its checkpoint is known")
    urgent = client.submit(until(gate), num_gpus=8, gpu_type="A100", priority="high")
    runs(urgent)
    view = shaken.view()
    assert (view.status, view.evictions, view.failures, view.infra_failures) == ("QUEUED", 1, 0, 0)
    assert view.outcome["message"] == f"evicted for {urgent.id}"
    stopped = re.search(r"stopped at step (\d+) of", shaken.logs())
    assert stopped, shaken.logs()
    assert shaken.why()["evidence"]
    gate.touch()
    succeeds(urgent, calm, shaken)
    assert (shaken.last.attempts, shaken.last.evictions, shaken.last.failures) == (2, 1, 0)
    assert f"resumed at step {stopped[1]} of" in shaken.logs(), (
        "not from its last checkpoint, from where it stopped"
    )
    weights = [re.search(r"weights sha256 ([0-9a-f]{64})", job.logs())[1] for job in (calm, shaken)]
    assert weights[0] == weights[1]


def test_a_function_that_obeys_has_not_ended(client, rules) -> None:
    """Its exit code is 0 when it leaves because it was told to: its work is not done."""
    rules(Policy({"default": QueuePolicy("default", preempt=Preempt.LOWER)}))

    def work() -> str:
        import time

        import rm

        begun = rm.checkpoint_dir() / "begun"
        if begun.exists():
            return "went on"
        rm.should_stop()
        rm.report(step=1)
        while not rm.should_stop():
            time.sleep(0.05)
        begun.touch()
        return "left"

    job = client.submit(work, **NODE)
    wait_until(lambda: job.progress, 30, "it listens")
    succeeds(client.submit("true", priority="high", **NODE))
    assert job.result(60) == "went on"
    assert (job.last.attempts, job.last.evictions) == (2, 1)


def test_jobs_wait_for_each_other(client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = client.submit(until(gate), num_gpus=1)
    second = client.submit("true", num_gpus=1, after=first)
    third = client.submit("true", num_gpus=1, after=[second.id, first])
    assert second.why()["code"] == "Dependency"
    assert third.last.after == (second.id, first.id)
    fails = client.submit("exit 3", num_gpus=1, after=first)
    never = client.submit("true", num_gpus=1, after=fails)
    nor_this = client.submit("true", num_gpus=1, after=never)
    gate.touch()
    succeeds(first, second, third)
    for job in (never, nor_this):
        view = job.wait(120)
        assert (view.status, view.attempts) == ("CANCELLED", 0)
    assert f"{fails.id}, which had to succeed first, ended FAILED" in never.last.outcome["message"]
    succeeds(client.submit("true", num_gpus=1, after=[first, second]))
    with pytest.raises(InvalidSpec, match=f"after: {fails.id} ended FAILED"):
        client.submit("true", num_gpus=1, after=fails)
    with pytest.raises(UnknownJob, match="after: no job 'j99999'"):
        client.submit("true", num_gpus=1, after="j99999")


def test_an_array_is_many_jobs_under_one_id(client) -> None:
    array = client.submit('echo "$RM_ARRAY_INDEX of $RM_ARRAY_SIZE"', num_gpus=8, array=4, hold=True)
    assert array.status == "QUEUED"
    assert array.why()["code"] == "Held"
    jobs = array.jobs()
    assert [job.id for job in jobs] == [f"{array.id}_{index}" for index in range(4)]
    jobs[3].cancel()
    last = client.submit("true", num_gpus=1, after=jobs[:3], name="after it")
    assert len(last.last.after) == 3
    array.release()
    assert array.wait(120).status == "CANCELLED", "one of them was"
    assert array.last.array_counts == {"SUCCEEDED": 3, "CANCELLED": 1}
    assert [job.logs() for job in jobs[:3]] == [f"{index} of 4\n" for index in range(3)]
    succeeds(last)
    assert {job.last.array for job in client.jobs(all=True, limit=20) if job.id in [j.id for j in jobs]} == {
        array.id
    }
    assert {each.job_id for each in array.events()} == {job.id for job in jobs}
    with pytest.raises(RequestError, match=f"{array.id}_0 to {array.id}_3"):
        array.logs()
    with pytest.raises(InvalidSpec, match="1 jobs have ended without success"):
        client.submit("true", num_gpus=1, after=array)


def test_an_array_of_functions_returns_a_list_and_is_cancelled_as_one(client) -> None:
    def square() -> int:
        import rm

        return rm.array_index() ** 2

    assert client.submit(square, num_gpus=1, array=3).result(60) == [0, 1, 4]
    array = client.submit("sleep 1000", num_gpus=8, array=5)
    wait_until(lambda: (array.view().array_counts or {}).get("RUNNING") == 3, 30, "three of five run")
    array.cancel()
    assert array.wait(120).array_counts == {"CANCELLED": 5}
    assert not user_processes()


def test_held_jobs_wait_until_they_are_released(client) -> None:
    job = client.submit("true", num_gpus=1, hold=True)
    other = client.submit("sleep 1000", num_gpus=1)
    runs(other)
    view = job.view()
    assert (view.status, view.held, view.held_by) == ("QUEUED", True, client.owner)
    assert job.why()["code"] == "Held"
    with pytest.raises(RequestError, match="only what is queued can be held"):
        other.hold()
    job.release()
    succeeds(job)
    assert [each.body["held"] for each in job.events() if each.kind == "HoldChanged"] == [False]
    other.cancel()


def test_an_elastic_gang_takes_what_there_is_and_comes_back_smaller(client, rules, tmp_path: Path) -> None:
    rules(Policy({"default": QueuePolicy("default", preempt=Preempt.LOWER)}))
    gate, end = tmp_path / "gate", tmp_path / "end"
    say = f'echo "$RANK of $WORLD_SIZE, $GROUP_WORLD_SIZE nodes"; {until(end)}; [ -e {end} ]'
    gang = client.submit(say, nodes=3, min_nodes=1, gpus_per_node=8, nproc_per_node=1)
    runs(gang)
    assert (gang.last.held_gpus, gang.last.ranks) == (24, 3)
    urgent = client.submit(until(gate), nodes=2, gpus_per_node=8, priority="high")
    runs(urgent)
    wait_until(
        lambda: (gang.view().status, gang.last.attempts) == ("RUNNING", 2), 30, "it goes on with one node"
    )
    assert (gang.last.held_gpus, gang.last.ranks, gang.last.evictions) == (8, 1, 1)
    wait_until(lambda: gang.logs() == "0 of 1, 1 nodes\n", 10, "its only rank knows that it is alone")
    gate.touch()
    end.touch()
    succeeds(urgent, gang)


def test_an_elastic_training_is_shrunk_for_who_comes_first_and_goes_on_from_its_checkpoint(
    client, rules, tmp_path: Path
) -> None:
    """Nobody may be evicted here: what is taken is only what the gang has above its minimum."""
    rules(Policy(settle_s=1.0))
    gate = tmp_path / "gate"

    def train() -> tuple[int, int, int]:
        import os
        import time

        import rm

        saved = rm.checkpoint_dir() / "step"
        step = begun = int(saved.read_text()) if saved.exists() else 0
        while not gate.exists() and not rm.should_stop():
            time.sleep(0.02)
            step += 1
            rm.report(step=step)
            if rm.rank() == 0 and step % 5 == 0:
                (saved.parent / "new").write_text(str(step))
                (saved.parent / "new").replace(saved)
                rm.checkpointed()
        return int(os.environ["WORLD_SIZE"]), begun, step

    filler = client.submit(until(gate), **NODE)
    runs(filler)
    gang = client.submit(train, nodes=3, min_nodes=1, gpus_per_node=8, nproc_per_node=1)
    runs(gang)
    assert (gang.last.held_gpus, gang.last.ranks) == (16, 2), "what there was"
    wait_until(lambda: gang.view().checkpoint_at, 60, "it has a checkpoint")
    first = client.submit(until(gate), num_gpus=8, priority="high")
    runs(first)
    wait_until(lambda: (gang.view().status, gang.last.attempts) == ("RUNNING", 2), 20, "it goes on with one")
    assert (gang.last.held_gpus, gang.last.ranks) == (8, 1)
    assert (gang.last.evictions, gang.last.failures, gang.last.infra_failures) == (1, 0, 0)
    stops = [each.body for each in gang.events() if each.kind == "StopRequested"]
    assert stops == [{"cause": "resized", "by": first.id}]
    wait_until(lambda: gang.view().checkpoint_at, 60, "it has another one")
    gate.touch()
    succeeds(filler, first, gang)
    world_size, begun, step = gang.result()
    assert world_size == 1
    assert step > begun > 0, "not from the start"
    assert gang.last.attempts == 2
