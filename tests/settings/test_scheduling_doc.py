"""The numbers in docs/scheduling.md, worked out by the code that they explain."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rm import tables
from rm.core import reasons
from rm.core.books import START_S
from rm.core.cycle import why
from rm.core.events import CheckpointReported, JobAdmitted, StopRequested
from rm.core.fairshare import Usage
from rm.core.model import Status
from rm.core.policy import DAY_S, Policy
from rm.core.preemption import loss
from rm.core.quota import QuotaTree
from rm.core.resources import GPU_UNIT
from rm.lending import Owned, owned
from rm.settings import QueueSettings, Settings
from rm.testing import Behaviour, FakeCluster
from rm.views import queue_views

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "scheduling.md").read_text()
LONG = Behaviour(1e6)
HOUR_S = 3600.0


def table(title: str) -> list[list[str]]:
    """The rows of the table whose first columns have these titles."""
    rows = re.search(rf"^\| {re.escape(title)} \|.*\n\|[ -|]*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert rows is not None, title
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[1].splitlines()]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def example() -> Policy:
    (text,) = blocks("yaml")
    settings = Settings.parse(text)
    assert settings.warnings() == []
    return settings.policy()


def settle(fake: FakeCluster) -> None:
    fake.run(lambda: all(job.status is Status.RUNNING for job in fake.state.jobs.values()))


def test_the_example_file_loads_without_a_warning() -> None:
    settings = Settings.parse((DOCS / "rm.example.yaml").read_text())
    assert settings.warnings() == []
    assert settings.policy().leaves() == ("nlp", "vision", "prod", "batch")
    assert settings.policy().queues["batch"].default_time_limit_s == 4 * HOUR_S


def test_every_field_is_explained_and_none_is_made_up() -> None:
    assert {row[0].strip("`") for row in table("field of the file")} == set(Settings.model_fields)
    assert {row[0].strip("`") for row in table("field of a queue")} == set(QueueSettings.model_fields) - {
        "queues"
    }


def test_every_reason_is_listed_in_order() -> None:
    codes = [value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)]
    assert [re.sub(r"\[(\w+)\].*", r"\1", row[0]) for row in table("reason")] == codes


def test_the_quota_table() -> None:
    policy = example()
    quota = QuotaTree(policy, {"": 24 * GPU_UNIT})
    names = ("nlp", "vision", "prod", "batch")
    for what, *cells in table("what happens"):
        for queue, way, gpus in re.findall(r"(\w+) (takes|gives back) (\d+)", what):
            quota.add(queue, "*", (1 if way == "takes" else -1) * int(gpus) * GPU_UNIT)
        assert [quota.available(name, "*") / GPU_UNIT for name in names] == [int(cell) for cell in cells], (
            what
        )
    owns = owned(policy)
    assert owns["nlp", "*"].kept == 4 * GPU_UNIT
    assert owns["prod", "*"].kept == 6 * GPU_UNIT
    assert owns["research", "*"] == Owned(12 * GPU_UNIT, 0)


def test_the_share_of_batch() -> None:
    quota = QuotaTree(example(), {"": 24 * GPU_UNIT})
    quota.add("batch", "*", 10 * GPU_UNIT)
    shares = re.search(r"its share is (\d+); with `weight: 2` it would be (\d+)", PAGE)
    assert shares is not None
    assert [int(each) for each in shares.groups()] == [
        round(quota.share("batch")),
        round(quota.share("batch") / 2),
    ]


def test_the_same_jobs_give_the_table_of_rmctl_queues() -> None:
    fake = FakeCluster(policy=example())
    for name in "abc":
        fake.add_node(name, 8)
    for gpus, queue in ((6, "batch"), (4, "batch"), (8, "nlp")):
        fake.submit(gpus, queue=queue, behaviour=LONG)
    settle(fake)
    last = fake.submit(6, queue="vision", behaviour=LONG)
    fake.run(lambda: fake.state.jobs[last].status is Status.RUNNING)
    views = queue_views(
        fake.policy, fake.state.books.quota, fake.state.jobs.values(), fake.state.capacity.by_type()
    )
    out = io.StringIO()
    tables.write(tables.console(out), tables.queues_table(views))
    assert out.getvalue() in blocks("text")


def test_the_decay_table() -> None:
    usage = Usage()
    usage.change(8 * GPU_UNIT, 0.0, 7 * DAY_S)
    one, seven, fourteen, after = (float(row[1]) for row in table("after"))
    for days, expected in ((1, one), (7, seven), (14, fourteen)):
        usage.settle(days * DAY_S, 7 * DAY_S)
        assert round(usage.average / GPU_UNIT, 3) == expected
    usage.change(-8 * GPU_UNIT, 14 * DAY_S, 7 * DAY_S)
    usage.settle(21 * DAY_S, 7 * DAY_S)
    assert round(usage.average / GPU_UNIT, 3) == after


def test_two_owners_take_turns() -> None:
    fake = FakeCluster()
    for owner in ("ada", "bob"):
        for _ in range(3):
            fake.submit(1, owner=owner)
    fake.add_node("n", 1)
    fake.run()
    admitted = [event.job_id for event in fake.history if isinstance(event, JobAdmitted)]
    assert admitted == ["j1", "j4", "j2", "j5", "j3", "j6"]


def test_a_job_that_has_waited_counts_one_name_higher() -> None:
    fake = FakeCluster()
    fake.add_node("n", 1)
    fake.submit(1, behaviour=Behaviour(1.5 * DAY_S))
    old = fake.submit(1, priority=-100)
    young = fake.submit(1, priority=-100, behaviour=Behaviour(DAY_S))
    fake.run(lambda: fake.now >= DAY_S)
    newer, high = fake.submit(1), fake.submit(1, priority=100)
    fake.run()
    admitted = [event.job_id for event in fake.history if isinstance(event, JobAdmitted)]
    assert admitted[1:] == [high, old, young, newer]


def test_the_backfill_table() -> None:
    fake = FakeCluster()
    fake.add_node("n", 8)
    limits = {"2 h": 2 * HOUR_S, "1 h": HOUR_S, "3 h": 3 * HOUR_S, "none": None}
    for job_id, gpus, limit, _ in table("job | GPUs | time limit"):
        limit_s = limits[limit]
        behaviour = Behaviour(limit_s - 60) if limit_s else LONG
        assert fake.submit(int(gpus), time_limit_s=limit_s, behaviour=behaviour) == job_id
        if job_id == "j1":
            settle(fake)
    assert fake.state.jobs["j3"].status is Status.RESERVING
    answers = {job_id: why(fake.state, fake.state.jobs[job_id], fake.now) for job_id in ("j2", "j4", "j5")}
    assert answers["j2"].code == reasons.WAITING_FOR_CAPACITY
    for job_id in ("j4", "j5"):
        assert (answers[job_id].code, answers[job_id].evidence["for"]) == (reasons.RESERVED, "j2")
    at = answers["j2"].evidence["at"]
    assert 2 * HOUR_S <= at <= 2 * HOUR_S + START_S + 30
    fake.run(lambda: "j2" in fake.ended)
    started = fake.ended["j2"].first_started_at
    assert started is not None
    assert started <= at


def test_the_table_of_victims() -> None:
    policy = Settings.parse("queues: {a: {preempt: lower}}").policy()
    fake = FakeCluster(policy=policy)
    fake.add_node("n", 8)
    for gpus, priority in ((2, -100), (4, -100), (2, 0)):
        fake.submit(gpus, queue="a", priority=priority, behaviour=LONG)
    settle(fake)
    fake.now += HOUR_S
    fake.happen(CheckpointReported(fake.now - 600, "j1", 1), CheckpointReported(fake.now - 60, "j2", 1))
    rows = table("job | GPUs | priority")
    assert {row[0]: float(row[4]) for row in rows} == {
        job.id: loss(job, fake.now) for job in fake.state.jobs.values()
    }
    last = fake.submit(6, queue="a", priority=100)
    assert why(fake.state, fake.state.jobs[last], fake.now).code == reasons.WAITING_FOR_VICTIMS
    stopped = [event.job_id for event in fake.history if isinstance(event, StopRequested)]
    assert stopped == [row[0] for row in rows[:2]]


def test_the_first_type_that_has_room_is_taken() -> None:
    fake = FakeCluster()
    for kind in ("A100", "H100"):
        fake.add_node(kind, 8, **{"ray.io/accelerator-type": kind})
    for _ in range(2):
        fake.submit(8, gpu_types=("H100", "A100"), behaviour=LONG)
    settle(fake)
    attempts = [job.attempt for job in fake.state.jobs.values()]
    assert [each.gpu_type for each in attempts if each] == ["H100", "A100"]


def test_an_elastic_gang_starts_with_what_there_is_and_gives_back_above_its_minimum() -> None:
    fake = FakeCluster()
    for name in "abc":
        fake.add_node(name, 4)
    gang = fake.submit(4, count=4, least=2, owner="ada", behaviour=LONG)
    settle(fake)
    attempt = fake.state.jobs[gang].attempt
    assert attempt is not None
    assert len(attempt.placed) == 3
    other = fake.submit(4, owner="bob", behaviour=LONG)
    fake.run(lambda: fake.state.jobs[other].status is Status.RUNNING)
    assert 60 <= fake.now < 65
    settle(fake)
    attempt = fake.state.jobs[gang].attempt
    assert attempt is not None
    assert len(attempt.placed) == 2
