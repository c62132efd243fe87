"""Bad requests get a clear error that names the field; badly behaved children end and leave nothing.

The `client` fixture checks after every test: zero GPUs charged, zero placement groups, zero processes.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
from probes import processes_with, user_processes, wait_until

from rm.errors import (
    Infeasible,
    InvalidSpec,
    JobFailed,
    JobNotFinished,
    NotPicklable,
    PayloadTooLarge,
    UnknownJob,
    UnknownQueue,
)

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"num_gpus": 0}, InvalidSpec, "num_gpus: must be more than 0"),
        ({"num_gpus": -1}, InvalidSpec, "num_gpus: must be more than 0"),
        ({"num_gpus": 1e9}, InvalidSpec, "num_gpus: must be at most"),
        ({"num_gpus": float("nan")}, InvalidSpec, "num_gpus"),
        ({"num_gpus": 1.5}, InvalidSpec, "use 1 or 2"),
        ({"num_gpus": "many"}, InvalidSpec, "num_gpus: must be a number"),
        ({"num_gpus": True}, InvalidSpec, "num_gpus: must be a number"),
        ({}, InvalidSpec, "num_gpus is missing"),
        ({"gpus_per_node": 0.3, "nodes": 2}, InvalidSpec, "a share of a device can't be a gang"),
        ({"num_gpus": 0.3, "nodes": 2}, InvalidSpec, "share of one device"),
        ({"num_gpus": 5, "nodes": 2}, InvalidSpec, "multiple of 2"),
        ({"gpus_per_node": 9}, Infeasible, "nodes="),
        ({"num_gpus": 25}, Infeasible, "25 GPUs asked for, but this cluster can never have more than 24"),
        ({"num_gpus": 4000}, Infeasible, "never have more than 24"),
        ({"nodes": 4, "gpus_per_node": 8}, Infeasible, "24"),
        ({"num_gpus": 1, "gpu_type": "B300"}, Infeasible, "it has A100, H100"),
        ({"num_gpus": 1, "labels": {"rack": "7"}}, Infeasible, "rack=7"),
        ({"num_gpus": 1, "cpus_per_gpu": 64}, Infeasible, "cpus_per_gpu"),
        ({"num_gpus": 1, "queue": "nope"}, UnknownQueue, "known queues: default"),
        ({"num_gpus": 1, "time_limit": "soon"}, InvalidSpec, "time_limit: must be a duration"),
        ({"num_gpus": 1, "time_limit": 0}, InvalidSpec, "time_limit: must be more than 0"),
        ({"num_gpus": 1, "priority": "urgent"}, InvalidSpec, "priority: must be"),
        ({"num_gpus": 1, "num_gpu": 1}, InvalidSpec, "did you mean 'num_gpus'"),
        ({"num_gpus": 1, "cwd": "/"}, InvalidSpec, "cwd: unknown option"),
        ({"num_gpus": 1, "payload_sha256": "x"}, InvalidSpec, "payload_sha256: unknown option"),
        ({"num_gpus": 1, "runtime_env": {"excludes": ["x"]}}, InvalidSpec, ".rayignore"),
        ({"num_gpus": 1, "nproc_per_node": 0}, InvalidSpec, "nproc_per_node: must be"),
        ({"num_gpus": 1, "strategy": "TIGHT"}, InvalidSpec, "strategy: must be one of PACK"),
        (
            {"num_gpus": 1, "working_dir": "/no/such/dir"},
            InvalidSpec,
            "working_dir: /no/such/dir does not exist",
        ),
        ({"num_gpus": 1, "runtime_env": {"pipp": []}}, InvalidSpec, "runtime_env.pipp: unknown"),
        ({"num_gpus": 1, "env": {"A=B": "1"}}, InvalidSpec, "environment variable"),
        ({"num_gpus": 1, "name": "a\nb"}, InvalidSpec, "name: must be at most 200 printable"),
        ({"num_gpus": 1, "name": "\x1b]0;gotcha\x07"}, InvalidSpec, "name: must be at most 200 printable"),
        ({"num_gpus": 1, "name": "a\u202egnp.exe"}, InvalidSpec, "name: must be at most 200 printable"),
        ({"num_gpus": 1, "owner": "ada\x1b[2J"}, InvalidSpec, "owner: must be at most 200 printable"),
        ({"num_gpus": 1, "owner": "a\u2066b"}, InvalidSpec, "owner: must be at most 200 printable"),
        ({"num_gpus": 1, "queue": "../default"}, InvalidSpec, "queue: must be a queue's name"),
        ({"num_gpus": 1, "queue": "default\n"}, InvalidSpec, "queue: must be a queue's name"),
        ({"num_gpus": 1, "after": "../j1"}, InvalidSpec, "after: must be job ids"),
        ({"num_gpus": 1, "max_retries": -1}, InvalidSpec, "max_retries: must be"),
    ],
)
def test_bad_requests_are_refused_with_the_way_out(client, options: dict, error: type, names: str) -> None:
    before = len(client.jobs(all=True, limit=1000))
    with pytest.raises(error) as caught:
        client.submit("true", **options)
    assert type(caught.value) is error, "our own error, not Ray's mixture of one"
    assert names in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(client.jobs(all=True, limit=1000)) == before, "nothing was accepted"


@pytest.mark.parametrize("command", ["", "   ", [], [""], 7, None, ["a", 7], "nul\0byte"])
def test_bad_commands_are_refused(client, command: object) -> None:
    with pytest.raises(InvalidSpec):
        client.submit(command, num_gpus=1)


def test_many_are_accepted_all_or_none(client) -> None:
    before = len(client.jobs(all=True, limit=1000))
    with pytest.raises(Infeasible):
        client.submit_many([{"entry": "true"}, {"entry": "true", "num_gpus": 99}], num_gpus=1)
    assert len(client.jobs(all=True, limit=1000)) == before


def test_unknown_jobs(client) -> None:
    for job_id in ("j99999", "99999", "no such job", "'; drop table jobs; --", "../../etc"):
        with pytest.raises(UnknownJob, match="rmctl ls"):
            client.job(job_id)


def test_what_cannot_be_pickled_and_what_is_too_large(client) -> None:
    lock = threading.Lock()
    with pytest.raises(NotPicklable, match="inside the function"):
        client.submit(lambda: lock, num_gpus=1)
    with pytest.raises(PayloadTooLarge, match="pass its path"):
        client.submit(len, b"x" * (17 * 2**20), num_gpus=1)


def test_a_result_that_is_too_large_says_what_to_do(client) -> None:
    def large() -> bytes:
        return b"x" * (17 * 2**20)

    with pytest.raises(JobFailed, match="checkpoint_dir"):
        client.submit(large, num_gpus=1).result(60)


def test_a_missing_script_and_a_missing_command(client) -> None:
    script = client.submit("python no_such_script.py", num_gpus=1)
    command = client.submit(["no-such-command", "--flag"], num_gpus=1)
    view = script.wait(120)
    assert view.status == "FAILED"
    assert view.outcome["exit_code"] == 2
    assert "no_such_script.py" in " ".join(view.outcome["tail"])
    view = command.wait(120)
    assert view.status == "FAILED"
    said = view.outcome["message"]
    assert re.match(r"rank 0 on [^ ]+: command 'no-such-command' was not found on PATH", said), said


@pytest.mark.parametrize(
    ("command", "code", "signal", "says"),
    [
        ("exit 3", 3, None, "exited with code 3"),
        ("kill -SEGV $$", None, 11, "SIGSEGV"),
        ("kill -KILL $$", None, 9, "SIGKILL"),
    ],
)
def test_how_a_child_ended_is_told(client, command: str, code, signal, says: str) -> None:
    job = client.submit(command, num_gpus=1)
    view = job.wait(120)
    assert view.status == "FAILED"
    assert (view.outcome["exit_code"], view.outcome["signal"]) == (code, signal)
    assert says in view.outcome["message"]
    assert view.attempts == 1, "a failure of user code is not retried unasked"


def test_retries_of_user_code_when_asked(client, tmp_path: Path) -> None:
    job = client.submit(
        f"echo x >> {tmp_path}/tries; test $(wc -l < {tmp_path}/tries) = 3", num_gpus=1, max_retries=2
    )
    view = job.wait(120)
    assert (view.status, view.attempts, view.failures) == ("SUCCEEDED", 3, 2)


def test_100_mb_of_output_arrive_whole(client) -> None:
    job = client.submit("head -c 100000000 /dev/zero | tr '\\0' x; echo; echo end", num_gpus=1)
    assert job.wait(120).status == "SUCCEEDED"
    client._allocator("settled", job.id)
    (log,) = [f for f in job._store("logs") if f.stream == "out"]
    assert log.size == 100_000_005
    assert log.closed


def test_a_closed_stdout_does_no_harm(client) -> None:
    job = client.submit("exec >&- 2>&-; sleep 0.5; exit 4", num_gpus=1)
    assert job.wait(120).outcome["exit_code"] == 4


def test_grandchildren_that_are_left_behind_are_ended(client) -> None:
    unmarked = "sleep 1000.25"
    command = (
        f"(setsid sleep 1000 &) ; nohup sleep 1000 & (env -i setsid {unmarked} &) ; sleep 0.3; echo started"
    )
    job = client.submit(command, num_gpus=1)
    assert job.wait(120).status == "SUCCEEDED"
    assert not user_processes()
    assert not processes_with("", command=unmarked), (
        "without our mark in its environment it is found by descent"
    )


def test_sigterm_ignored_by_all_of_a_tree_is_no_way_out(client) -> None:
    job = client.submit("trap '' TERM; (trap '' TERM; sleep 1000) & sleep 1000", num_gpus=2, grace=1)
    wait_until(lambda: job.status == "RUNNING", what="it runs")
    time.sleep(0.5)
    job.cancel()
    assert job.wait(120).status == "CANCELLED"
    assert not user_processes()


def test_waiting_has_an_end(client) -> None:
    job = client.submit("sleep 1000", num_gpus=1)
    with pytest.raises(JobNotFinished, match="it goes on"):
        job.wait(0.2)


def test_a_lease_that_cannot_be_had_in_time_is_given_up(client) -> None:
    blocker = client.submit("sleep 1000", nodes=3, gpus_per_node=8)
    wait_until(lambda: blocker.status == "RUNNING", what="it runs")
    with pytest.raises(JobNotFinished, match="needs 1 GPU, 0 are free"):
        client.lease(num_gpus=1, timeout=0.5).__enter__()
    assert {job.id for job in client.jobs()} == {blocker.id}


def test_names_with_tricks_are_only_names(client) -> None:
    tricks = [
        "'; drop table jobs; --",
        "<script>alert(1)</script>",
        "$(touch /tmp/pwned)",
        "../../x",
        "[red]x[/red]",
    ]
    entries = [{"entry": "true", "name": name, "owner": name} for name in tricks]
    jobs = client.submit_many(entries, num_gpus=1)
    for job, name in zip(jobs, tricks, strict=True):
        assert job.wait(120).status == "SUCCEEDED"
        assert (job.view().name, job.view().owner) == (name, name)
        assert [each.id for each in client.jobs(all=True, owner=name)] == [job.id]
        assert "<script>" not in job._repr_html_()
    assert not Path("/tmp/pwned").exists()
