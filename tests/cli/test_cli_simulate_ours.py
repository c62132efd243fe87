"""`rmctl simulate` with our own scheduler: rules from the command line, a growing cluster, the user's own ledger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm.core.capacity import Totals
from rm.core.events import JobSubmitted, RunStarted
from rm.core.model import Gang, Job, Kind, Status
from rm.core.resources import GPU_UNIT, Bundle
from rm.ledger import Accepted, Batch, EventRow, Ledger
from rm.sim.policies import POLICIES
from rm.spec import build_spec

TOTALS = Totals(8 * GPU_UNIT, 0, 0, 8 * GPU_UNIT)


def test_ours_is_what_is_replayed_where_nothing_is_said(rmctl: Any, trace: Path) -> None:
    ran = rmctl("simulate", str(trace), "--nodes", "2", "--json")
    assert [row["policy"] for row in ran.json] == ["rm-default"]
    assert ran.json[0]["jobs"] == 80


def test_the_policies_are_listed_from_the_registry(rmctl: Any) -> None:
    ran = rmctl("simulate", "--policies", "--json")
    assert {row["name"]: row["summary"] for row in ran.json} == {n: p.summary for n, p in POLICIES.items()}
    shown = rmctl("simulate", "--policies")
    assert all(name in shown.out for name in POLICIES)
    helped = " ".join(rmctl("simulate", "--help").out.replace("│", " ").split())
    assert all(name in helped for name in POLICIES)


def test_one_rule_changed(rmctl: Any, trace: Path) -> None:
    plain = rmctl("simulate", str(trace), "--nodes", "2", "--json").json[0]
    skips = rmctl("simulate", str(trace), "--nodes", "2", "--set", "backfill=skip", "--json").json[0]
    half = rmctl("simulate", str(trace), "--nodes", "4", "--set", "queues.a.nominal=16", "--json").json[0]
    assert skips["mean_jct_s"] != plain["mean_jct_s"]
    assert half["preemptions"] >= 0


def test_nodes_that_come_and_go(rmctl: Any, trace: Path) -> None:
    fixed = rmctl("simulate", str(trace), "--nodes", "2", "--json").json[0]
    words = ("simulate", str(trace), "--autoscale", "0:2", "--boot", "2m", "--idle", "1m")
    grown = rmctl(*words, "--json").json[0]
    assert fixed["node_hours"] == 0
    assert 0 < grown["node_hours"] <= 2 * grown["makespan_s"] / 3600
    assert grown["mean_queue_s"] > fixed["mean_queue_s"], "somebody waits for the first boot"
    assert "up to 16 GPUs" in rmctl(*words).err


@pytest.mark.parametrize(("words", "says"), [
    (["--nodes", "2", "--set", "queues.c.nominal=1"], "there is no queue 'c'; there are a, b"),
    (["--nodes", "2", "--set", "queues.a.nominal=x"], "queues.a.nominal: 'x' is no number of GPUs"),
    (["--nodes", "2", "--set", "queues.a.nominell=1"], "a queue has no 'nominell'; it has"),
    (["--nodes", "2", "--set", "nominal=1"], "nominal is unknown; there are queues.NAME.FIELD and backfill"),
    (["--nodes", "2", "--set", "backfill=maybe"], "backfill: 'maybe' is not one of easy, skip, none"),
    (["--nodes", "2", "--set", "backfill"], "'backfill' is not PATH=VALUE"),
    (["--nodes", "2", "-p", "fifo", "--set", "backfill=skip"], "no policy here is it; add --policy rm-default"),
    (["--nodes", "2", "--set", "queues.a.nominal=0", "--set", "queues.a.borrow_limit=0"], "never starts (ExceedsQuota"),
    (["--nodes", "2", "--autoscale", "0:2"], "say either --nodes N or --autoscale MIN:MAX"),
    (["--autoscale", "2"], "autoscale: '2' is no range of nodes; say 4:47"),
    (["--autoscale", "0:2", "-p", "fifo"], "fifo has rules for a fixed cluster alone"),
    (["--nodes", "2", "--checkpoint", "0"], "checkpoint: '0' is less than 1 s"),
    (["--nodes", "2", "--restart", "soon"], "restart: "),
    (["--nodes", "2", "--config", "none.yaml"], "config: none.yaml: "),
    (["--nodes", "2", "--from-ledger"], "name a trace, or say --from-ledger"),
    ([], "say either --nodes N or --autoscale"),
])  # fmt: skip
def test_what_can_not_be_meant(
    rmctl: Any, trace: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trace.parent)
    ran = rmctl("simulate", str(trace), *words)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
    assert ran.err.count("\n") == 1


def fill(url: str) -> None:
    """Three jobs that ran (one of them in two attempts), one that never did and one that still waits."""
    spec = build_spec(kind="command", command=("python", "train.py"), num_gpus=2, name="train", owner="ada")
    gang = Gang(Bundle(2 * GPU_UNIT))
    jobs = [
        Job(
            f"j{n}",
            n,
            "train",
            "ada",
            Kind.COMMAND,
            gang,
            1_000.0 + 10 * n,
            queue="research",
            time_limit_s=900.0,
        )
        for n in range(1, 6)
    ]
    over = Status.SUCCEEDED
    records = [
        replace(jobs[0], status=over, attempts=1, first_started_at=1_020.0, ended_at=1_120.0),
        replace(jobs[1], status=over, attempts=2, first_started_at=1_030.0, ran_s=40.0, ended_at=1_360.0),
        replace(jobs[2], status=Status.FAILED, attempts=1, first_started_at=1_040.0, ended_at=1_050.0),
        replace(jobs[3], status=Status.CANCELLED, ended_at=1_100.0),
        jobs[4],
    ]
    events = [
        *(JobSubmitted(job.submitted_at, job) for job in jobs),
        RunStarted(1_030.0, "j2", 1),
        RunStarted(1_300.0, "j2", 2),
    ]
    ledger = Ledger.open(url)
    try:
        ledger.commit(
            Batch(
                [Accepted(job, spec, f"key-{job.id}") for job in jobs],
                [EventRow(event, TOTALS, TOTALS) for event in events],
                records,
            )
        )
    finally:
        ledger.close()


def test_the_own_ledger(rmctl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rm.cli.simulate import _ledger_jobs

    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    monkeypatch.setenv("RM_LEDGER_URL", url)
    missing = rmctl("simulate", "--from-ledger", "--nodes", "1")
    assert missing.code == 2
    assert "there is no ledger at" in missing.err
    assert not (tmp_path / "ledger.sqlite").exists()
    fill(url)
    jobs = _ledger_jobs()
    assert [(job.job_id, job.submit_s, job.duration_s, job.final_state) for job in jobs] == [
        ("j1", 0, 100, "SUCCEEDED"),
        ("j2", 10, 40 + 60, "SUCCEEDED"),
        ("j3", 20, 10, "FAILED"),
    ]
    assert {(job.num_gpus, job.user, job.queue, job.name, job.time_limit_s, job.bundles) for job in jobs} == {
        (2, "ada", "research", "train", 900.0, 1)
    }
    ran = rmctl("simulate", "--from-ledger", "--nodes", "1", "--set", "queues.research.nominal=2", "--json")
    assert ran.json[0]["jobs"] == 3
    assert "left out: 1 never ran" in ran.err
    assert "left out: 1 have not ended" in ran.err
