"""From a request to the job: the queue's rules and defaults, the gang, and what it waits for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from test_writer import Flaky, World, until, with_writer
from test_writer import draft as plain_draft

from rm.core.events import RunExited, StopRequested
from rm.core.model import Job, NodeShape, Outcome, Status, StopCause
from rm.core.policy import Policy, QueuePolicy
from rm.errors import Infeasible, InvalidSpec, PayloadTooLarge, UnknownJob, UnknownQueue
from rm.ledger.codec import encode_spec
from rm.runtime.drafts import MOST_STORED_BYTES, Dependencies, Drafting, requested
from rm.runtime.writer import Writer
from rm.spec import JobSpec, build_spec

SHAPES = (NodeShape(8, 64_000, 2**36, most=2),)
POLICY = Policy(
    {
        "lab": QueuePolicy("lab"),
        "lab/vision": QueuePolicy("lab/vision", "lab", default_priority=7, default_time_limit_s=60.0),
        "lab/text": QueuePolicy("lab/text", "lab", max_time_limit_s=100.0),
        "rest": QueuePolicy("rest"),
    },
    default_queue="lab/vision",
)


def job(policy: Policy = POLICY, **fields: Any) -> Job:
    spec = build_spec(**{"kind": "command", "command": ("true",), "num_gpus": 1, "owner": "ada", **fields})
    return Drafting(policy, SHAPES).draft(spec, spec.after, 5.0)("j1", 1)


def asked(**fields: Any) -> JobSpec:
    return build_spec(**{"kind": "command", "command": ("true",), "num_gpus": 1, "owner": "ada", **fields})


def texts(*specs: JobSpec) -> list[str]:
    return [encode_spec(spec) for spec in specs]


def test_requests_are_read_as_they_were_written() -> None:
    specs = [
        asked(env={"A": "\0".join("x")}, command=("echo", "\udc80 \ufdd0")),
        asked(num_gpus=0.5, time_limit_s="2h", array=3),
    ]
    assert requested(texts(*specs)) == specs


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nothing", "Invalid JSON"),
        ("{}", "kind"),
        (encode_spec(asked()).replace('"grace_s":30.0', '"grace_s":-1'), "grace"),
        (encode_spec(asked()).replace('{"kind"', '{"novelty":1,"kind"'), "novelty"),
    ],
)
def test_a_text_that_is_no_request_names_its_field(text: str, named: str) -> None:
    with pytest.raises(InvalidSpec, match=named):
        requested([encode_spec(asked()), text])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"command": ("echo", "x" * MOST_STORED_BYTES)}, "command"),
        ({"env": {"DATA": "x" * MOST_STORED_BYTES}}, "env"),
        ({"runtime_env": {"pip": ["x" * 1000] * 300}}, "runtime_env"),
        ({"after": tuple(range(10**8, 10**8 + 30_000))}, "after"),
    ],
)
def test_a_request_too_large_for_the_ledger_names_its_largest_part(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(PayloadTooLarge, match=f"^{named}: the request takes .* at most 256 KiB") as caught:
        requested(texts(asked(), asked(**fields)))
    assert caught.value.field == named
    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "gang", "uncut"),
    [
        ({"num_gpus": 32}, "32 GPU", True),
        ({"num_gpus": 12}, "2 × 6 GPU", True),
        ({"num_gpus": 1, "gpu_type": "H100"}, "1 GPU (H100)", False),
        ({"num_gpus": None, "nodes": 3, "gpus_per_node": 16}, "3 × 16 GPU", False),
        ({"num_gpus": None, "nodes": 3, "gpus_per_node": 16, "min_nodes": 2}, "2 to 3 × 16 GPU", False),
        ({"num_gpus": 32, "nodes": 2}, "2 × 16 GPU", False),
    ],
)
def test_nothing_is_infeasible_while_node_types_are_awaited(
    fields: dict[str, Any], gang: str, uncut: bool
) -> None:
    drafting = Drafting(POLICY, SHAPES, awaited=True)
    made = drafting.draft(asked(**fields), (), 5.0)("j1", 1)
    assert (str(made.gang), made.uncut) == (gang, uncut)
    known = Drafting(POLICY, SHAPES)
    if fields["num_gpus"] != 12:
        with pytest.raises(Infeasible):
            known.draft(asked(**fields), (), 5.0)


def test_a_submission_too_large_for_the_ledger_counts_each_job_of_an_array() -> None:
    large = {"env": {"DATA": "x" * 200_000}}
    assert requested(texts(asked(array=300, **large))) == [asked(array=300, **large)]
    with pytest.raises(PayloadTooLarge, match="entries: the requests take 76 MiB"):
        requested(texts(asked(array=400, **large)))
    with pytest.raises(PayloadTooLarge, match="submit them in parts"):
        requested(texts(asked(**large)) * 400)


def test_what_is_not_said_comes_from_the_queue() -> None:
    made = job()
    assert (made.queue, made.priority, made.time_limit_s) == ("lab/vision", 7, 60.0)
    made = job(priority=0, time_limit_s="2m")
    assert (made.priority, made.time_limit_s) == (0, 120.0), "what is said is said, even if it is nothing"
    made = job(queue="rest")
    assert (made.queue, made.priority, made.time_limit_s) == ("rest", 0, None)


def test_a_queue_with_a_longest_time_limit_gives_it_to_all() -> None:
    assert job(queue="lab/text").time_limit_s == 100.0
    assert job(queue="lab/text", time_limit_s=100).time_limit_s == 100.0
    with pytest.raises(
        InvalidSpec, match=r"time_limit: 101 s is more than the 100 s that queue lab/text"
    ) as caught:
        job(queue="lab/text", time_limit_s=101)
    assert caught.value.field == "time_limit"


@pytest.mark.parametrize(
    ("policy", "queue", "said"),
    [
        (POLICY, "nowhere", "queue: there is no queue 'nowhere'; known queues: lab/vision, lab/text, rest"),
        (POLICY, "lab", "'lab' is a group of queues; submit to one of them: lab/vision, lab/text"),
        (Policy({"a": QueuePolicy("a")}), "", "no default queue; name one; known queues: a"),
        (Policy(), "other", "there is no queue 'other'; known queues: default"),
    ],
)
def test_only_leaves_take_jobs(policy: Policy, queue: str, said: str) -> None:
    with pytest.raises(UnknownQueue, match=said) as caught:
        job(policy, queue=queue)
    assert caught.value.field == "queue"


def test_options_of_the_job_arrive() -> None:
    made = job(preemptible=False, min_runtime_s="5m", hold=True, after=["j7", 8])
    assert (made.preemptible, made.min_runtime_s, made.held, made.held_by) == (False, 300.0, True, "ada")
    assert made.after == ("j7", "j8")


def test_an_elastic_gang_is_accepted_for_its_minimum() -> None:
    made = job(num_gpus=None, nodes=4, min_nodes=2, gpus_per_node=8)
    assert (made.gang.count, made.gang.minimum) == (4, 2)
    made = job(num_gpus=8, nodes=4, min_nodes=4)
    assert (made.gang.count, made.gang.least) == (4, 0), "not elastic"
    with pytest.raises(Infeasible):
        job(num_gpus=None, nodes=4, min_nodes=3, gpus_per_node=8)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("min_nodes", {"min_nodes": 2}),
        ("min_nodes", {"nodes": 2, "min_nodes": 3, "num_gpus": 2}),
        ("min_nodes", {"nodes": 2, "min_nodes": 0, "num_gpus": 2}),
        ("array", {"array": 0}),
        ("array", {"array": 10_001}),
        ("array", {"array": True}),
        ("array", {"array": 2, "kind": "lease", "command": (), "ttl_s": 5}),
        ("after", {"after": "yesterday"}),
        ("after", {"after": [True]}),
        ("after", {"after": 1.5}),
        ("min_runtime", {"min_runtime_s": "a while"}),
        ("preemptible", {"preemptible": "yes"}),
        ("hold", {"hold": 1}),
        ("priority", {"priority": "urgent"}),
        ("queue", {"queue": "a b"}),
    ],
)
def test_each_bad_value_names_its_field(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        job(**fields)
    assert caught.value.field == field
    assert field in caught.value.message


async def settled(writer: Writer, ledger: Flaky, *names: str) -> tuple[str, ...]:
    waits = Dependencies(writer, ledger)  # type: ignore[arg-type]
    await waits.settle(names)
    return waits.left(names)


def test_what_a_job_waits_for_is_what_has_not_succeeded_yet(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        done, array = await writer.submit([plain_draft("a"), plain_draft("b", array=3)])
        await until(lambda: len(writer.view().ended) == 4)
        assert await settled(writer, ledger, done, array) == ()
        world.hold_runs = True
        live, more = await writer.submit([plain_draft("c"), plain_draft("d", array=2)])
        assert await settled(writer, ledger, done, live, more) == (live, f"{more}_0", f"{more}_1")
        await until(lambda: writer.view().jobs[f"{more}_0"].status is Status.RUNNING)
        writer.post(RunExited(6, f"{more}_0", 1, Outcome(Status.SUCCEEDED)))
        await until(lambda: f"{more}_0" in writer.view().ended)
        assert await settled(writer, ledger, more) == (f"{more}_1",)
        for name in ("j99", "j3_7", f"{live}_0"):
            with pytest.raises(UnknownJob, match=f"after: no job '{name}'") as caught:
                await settled(writer, ledger, live, name)
            assert caught.value.field == "after"
        await writer.request_all(
            [StopRequested(7, each, StopCause.CANCELLED) for each in list(writer.state.jobs)]
        )
        for each in list(writer.state.jobs):
            writer.post(RunExited(8, each, 1, Outcome(Status.FAILED)))
        await until(lambda: not writer.view().jobs)
        for name in (live, more):
            with pytest.raises(InvalidSpec, match=f"after: {name} .*could never start") as wrong:
                await settled(writer, ledger, name)
            assert wrong.value.field == "after"

    with_writer(tmp_path, body, gpus=8)


def test_an_end_that_is_being_committed_is_waited_for(tmp_path: Path) -> None:
    """Gone from the state and not yet ended in the ledger: neither answer is right yet."""

    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        world.hold_runs = True
        one, array = await writer.submit([plain_draft("a"), plain_draft("b", array=2)])
        await until(lambda: all(j.status is Status.RUNNING for j in writer.view().jobs.values()))
        gone = {each: writer.state.jobs.pop(each) for each in (one, f"{array}_1")}
        asked = asyncio.create_task(settled(writer, ledger, one, array))
        await asyncio.sleep(0.1)
        assert not asked.done()
        writer.state.jobs.update(gone)
        assert sorted(await asyncio.wait_for(asked, 5)) == sorted([one, f"{array}_0", f"{array}_1"])
        for each in list(writer.state.jobs):
            writer.post(RunExited(8, each, 1, Outcome(Status.SUCCEEDED)))
        await until(lambda: not writer.view().jobs)

    with_writer(tmp_path, body)


def test_drafts_serve_as_long_as_rules_and_nodes_are_the_same() -> None:
    drafting = Drafting(POLICY, SHAPES)
    assert drafting.serves(POLICY, (NodeShape(8, 64_000, 2**36, most=2),), awaited=False)
    assert not drafting.serves(POLICY, (*SHAPES, *SHAPES), awaited=False)
    assert not drafting.serves(Policy(POLICY.queues), SHAPES, awaited=False), (
        "other rules, though they say the same"
    )
    assert not drafting.serves(POLICY, SHAPES, awaited=True)
