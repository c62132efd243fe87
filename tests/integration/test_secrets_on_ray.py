"""A secret in a job's environment reaches the job, and nobody else: no listing, no event, no log, no error."""

from __future__ import annotations

import json
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest
from probes import wait_until

from rm import cli
from rm.errors import JobFailed, RmError
from rm.job import Job

pytestmark = pytest.mark.ray

SECRET = "hunter2-c4ca4238a0b92382"
"""Nowhere else on this machine, so that one hit is one leak."""
ENV = {"env": {"TOKEN": SECRET}, "runtime_env": {"env_vars": {"OTHER": SECRET + "-too"}}}
HAS_BOTH = 'test "${#TOKEN}" = 24 -a "${#OTHER}" = 28 || exit 9'


def files_with(root: Path, word: str) -> list[str]:
    """Files below `root` that hold the word, sockets and what vanishes meanwhile left out."""
    found = []
    for path in root.rglob("*"):
        try:
            if stat.S_ISREG(path.lstat().st_mode) and word.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found


def command_lines() -> str:
    said = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(said)


def test_a_secret_stays_with_its_job(ray_cluster, client, capsys: pytest.CaptureFixture[str]) -> None:
    def rmctl(*words: str) -> str:
        cli.run(["--address", ray_cluster.address, *words])
        shown = capsys.readouterr()
        return shown.out + shown.err

    def broken() -> None:
        raise ValueError("no good")

    shown: dict[str, Any] = {}
    failing = client.submit(f"{HAS_BOTH}; exit 3", num_gpus=1, max_retries=1, **ENV)
    raising = client.submit(broken, num_gpus=1, **ENV)
    missing = client.submit(["no-such-command"], num_gpus=1, **ENV)
    running = client.submit("sleep 1000", num_gpus=1, name="long", **ENV)
    limited = client.submit("sleep 1000", num_gpus=1, time_limit=0.5, **ENV)
    held = client.submit("true", num_gpus=1, hold=True, array=2, **ENV)
    jobs: list[Job] = [failing, raising, missing, running, limited, held]
    wait_until(lambda: running.status == "RUNNING", what="it runs")
    shown["command lines"] = command_lines()
    assert "sleep\x001000" in shown["command lines"]
    for number, options in enumerate(({"num_gpus": 999}, {"num_gpus": -1}, {"num_gpus": 1, "queue": "nope"})):
        with pytest.raises(RmError) as caught:
            client.submit("true", **{**ENV, **options})
        shown[f"refusal {number}"] = repr(caught.value) + str(caught.value)
    shown["why"] = [dict(job.why()) for job in jobs] + [str(job.why()) for job in jobs]
    shown["rmctl why"] = rmctl("why", held.id) + rmctl("why", "--json", held.id)
    running.cancel()
    held.cancel()
    for job in jobs:
        job.wait(120)
    assert failing.last.outcome["exit_code"] == 3, "the job has both of them"
    with pytest.raises(JobFailed) as caught:
        raising.result()
    shown["failure"] = repr(caught.value) + str(caught.value)
    for job in jobs:
        shown[f"{job.id}"] = [repr(job), job._repr_html_(), repr(job.last), job.last.to_dict()]
        shown[f"{job.id} in rmctl"] = rmctl("show", job.id) + rmctl("show", "--json", job.id)
        shown[f"{job.id} events"] = [each.to_dict() for each in job.events()]
    shown["events"] = [each.to_dict() for each in client.events(limit=100_000)]
    shown["listings"] = [
        rmctl(*words, *as_json)
        for words in (
            ("ls", "--all"),
            ("ls", held.id),
            ("events",),
            ("nodes",),
            ("queues",),
            ("cancel", held.id),
        )
        for as_json in ((), ("--json",))
    ]
    shown["client"] = repr(client) + str(client.hello()) + str(client.policy())
    leaks = [where for where, what in shown.items() if SECRET in json.dumps(what, default=str)]
    assert not leaks

    home = Path(ray_cluster.home)
    with sqlite3.connect(home / "ledger.sqlite") as ledger:
        query = "SELECT count(*) FROM {} WHERE instr({}, ?)"
        count = lambda table, column: ledger.execute(query.format(table, column), [SECRET]).fetchone()[0]  # noqa: E731
        assert count("jobs", "spec") == len(jobs) + 1, "where it must be, to run after a restart"
        assert count("jobs", "record") == count("events", "body") == count("meta", "value") == 0
    ledger.close()
    holding = files_with(home, SECRET)
    assert {Path(each).name for each in holding} <= {"ledger.sqlite", "ledger.sqlite-wal"}, holding
    assert {stat.S_IMODE(Path(each).stat().st_mode) for each in home.glob("ledger*")} == {0o600}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700

    logs = Path(ray_cluster.cluster.head_node.get_logs_dir_path())
    assert files_with(logs, "worker"), "these are Ray's logs, the allocator's and the runners' among them"
    assert files_with(logs, SECRET) == []
