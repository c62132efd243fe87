"""What queues need of the ledger: usage over time, the rules in force, arrays, what there is to learn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from alembic import command
from hypothesis import given, settings
from ledger_batches import admitted, array_of, ended, make_job, row, submission
from ledger_strategies import records
from sqlalchemy import text

from rm.core.events import PolicyChanged
from rm.core.fairshare import Usage
from rm.core.model import Cordon, Phase, Status
from rm.core.policy import Order, Policy, Preempt, QueuePolicy, Reclaim
from rm.core.resources import GPU_UNIT
from rm.core.state import ClusterState
from rm.ledger import AppliedPolicy, Batch, Ledger, codec, schema

Open = Callable[[str], Ledger]

POLICY = Policy(
    {
        "lab": QueuePolicy("lab"),
        "lab/a": QueuePolicy("lab/a", "lab", {"*": 8 * GPU_UNIT}, preempt=Preempt.LOWER, weight=2.5),
        "lab/b": QueuePolicy(
            "lab/b", "lab", {"A100": 1}, {}, None, reclaim=Reclaim.NEVER, labels=(("a", "b"),)
        ),
    },
    default_queue="lab/a",
    order=Order.FIFO,
)

OLD = {
    "live": """{"id":"j1","seq":1,"name":"train","owner":"ada","kind":"command","gang":{"bundle":{"gpu_units":20000,
"cpu_milli":0,"memory_bytes":0},"count":1,"strategy":"PACK","gpu_types":[],"labels":[]},"submitted_at":1001.0,
"queue":"default","priority":100,"time_limit_s":3600.0,"grace_s":30.0,"max_retries":0,"max_infra_retries":3,
"ttl_s":null,"status":"RUNNING","attempt":{"number":1,"placed":[{"node_id":"node-1","slots":[0,1]}],"phase":"RUNNING",
"admitted_at":2000.0,"started_at":2001.0,"stop":null,"stop_by":"","outcome":null},"attempts":1,"failures":0,
"infra_failures":0,"eligible_at":0.0,"queued_at":0.0,"first_started_at":2001.0,"ended_at":null,"outcome":null,
"reason":null}""",
    "queued": """{"id":"j2","seq":2,"name":"train","owner":"ada","kind":"command","gang":{"bundle":{"gpu_units":20000,
"cpu_milli":0,"memory_bytes":0},"count":1,"strategy":"PACK","gpu_types":[],"labels":[]},"submitted_at":1002.0,
"queue":"default","priority":100,"time_limit_s":3600.0,"grace_s":30.0,"max_retries":0,"max_infra_retries":3,
"ttl_s":null,"status":"QUEUED","attempt":null,"attempts":0,"failures":0,"infra_failures":0,"eligible_at":0.0,
"queued_at":0.0,"first_started_at":null,"ended_at":null,"outcome":null,"reason":{"code":"WaitingForCapacity",
"message":"needs 2","evidence":{"free_gpus":0},"advice":"wait"}}""",
    "ended": """{"id":"j3","seq":3,"name":"train","owner":"ada","kind":"command","gang":{"bundle":{"gpu_units":20000,
"cpu_milli":0,"memory_bytes":0},"count":1,"strategy":"PACK","gpu_types":[],"labels":[]},"submitted_at":1003.0,
"queue":"default","priority":100,"time_limit_s":3600.0,"grace_s":30.0,"max_retries":0,"max_infra_retries":3,
"ttl_s":null,"status":"SUCCEEDED","attempt":null,"attempts":1,"failures":0,"infra_failures":0,"eligible_at":0.0,
"queued_at":0.0,"first_started_at":2001.0,"ended_at":3000.0,"outcome":{"status":"SUCCEEDED","message":"it is over",
"rank":null,"node_id":null,"exit_code":null,"signal":null,"tail":[],"infra":false},"reason":null}""",
    "spec": """{"kind":"command","name":"train","owner":"ada","queue":"default","priority":100,"resources":
{"num_gpus":2.0,"nodes":null,"gpus_per_node":null,"gpu_type":["A100","H100"],"cpus_per_gpu":0.0,"memory_per_gpu":0,
"labels":{},"strategy":"PACK"},"command":["python","train.py"],"payload_sha256":"","nproc_per_node":1,
"working_dir_sha256":"","cwd":"","env":{},"runtime_env":{},"python":"","time_limit_s":3600.0,"grace_s":30.0,
"max_retries":0,"max_infra_retries":3,"ttl_s":null}""",
    "event": """{"at":2000.0,"job_id":"j1","attempt":1,"placed":[{"node_id":"node-1","slots":[0,1]}]}""",
}
"""What version 0.1.0 wrote, word for word."""


@pytest.fixture
def old_ledger(opened: Open, url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a ledger in its first shape, with a running, a queued and an ended job."""
    to_first = lambda config, _head: real(config, "0001")  # noqa: E731
    real = command.upgrade
    with monkeypatch.context() as patched:
        patched.setattr(schema.command, "upgrade", to_first)
        ledger = opened(url)
    insert = text(
        "INSERT INTO jobs (id, seq, name, owner, queue, kind, status, submitted_at, ended_at, key, record, spec) "
        "VALUES (:id, :seq, 'train', 'ada', 'default', 'command', :status, 1001, :ended_at, :key, :record, :spec)"
    )
    happened = text(
        "INSERT INTO events (at, kind, job_id, attempt, body, free_before, free_after, charged_before, charged_after) "
        "VALUES (2000, 'JobAdmitted', 'j1', 1, :body, 0, 0, 0, 0)"
    )
    with ledger._database.transaction() as connection:
        for name in ("live", "queued", "ended"):
            record = json.loads(OLD[name])
            values = {key: record[key] for key in ("id", "seq", "status", "ended_at")}
            connection.execute(
                insert, {**values, "key": record["id"], "record": OLD[name], "spec": OLD["spec"]}
            )
        connection.execute(happened, {"body": OLD["event"]})
    ledger.close()
    return url


def test_a_ledger_of_the_first_shape_is_brought_up_and_its_records_load(
    opened: Open, old_ledger: str
) -> None:
    ledger = opened(old_ledger)
    loaded = ledger.load()
    live, queued = loaded.jobs
    assert (live.id, live.preemptible, live.after, live.held, live.array) == ("j1", True, (), False, "")
    assert live.attempt is not None
    assert (live.attempt.phase, live.attempt.checkpoint_at, live.attempt.gpu_type) == (
        Phase.RUNNING,
        None,
        None,
    )
    assert (live.gang.minimum, live.gang.least) == (1, 0)
    assert queued.reason is not None
    assert queued.reason.code == "WaitingForCapacity"
    assert [job.id for job in loaded.ended] == ["j3"]
    assert (loaded.usage, loaded.policy, loaded.next_seq) == ([], None, 4)
    assert ledger.spec("j1").resources.min_nodes is None
    assert ledger.events("j1")[0].body["placed"] == [{"node_id": "node-1", "slots": [0, 1]}]
    state = ClusterState(Policy())
    state.restore(loaded.jobs, loaded.usage, loaded.ended)
    state.check()


def test_an_upgraded_ledger_takes_all_that_is_new(opened: Open, old_ledger: str) -> None:
    ledger = opened(old_ledger)
    queued = ledger.load().jobs[1]
    ledger.commit(
        Batch(changed=[replace(queued, held=True)], usage=[(("default", "ada"), Usage(1.5, 0, 7.0))])
    )
    ledger.commit(array_of(3, 4))
    assert ledger.load().jobs[1].held
    assert [each.job.id for each in ledger.members("j4")] == ["j4_0", "j4_1", "j4_2"]


def test_usage_is_kept_in_the_same_transaction_and_overwritten(opened: Open, url: str) -> None:
    ledger = opened(url)
    odd = ("lab/a", "a\0\udc80")
    ledger.commit(Batch(usage=[(("lab/a", "ada"), Usage(1.25, 9, 10.0)), (odd, Usage(2.0, 0, 11.0))]))
    ledger.commit(Batch(usage=[(("lab/a", "ada"), Usage(3.5, 1, 20.0))]))
    ledger.close()
    usage = dict(opened(url).load().usage)
    assert usage[odd] == Usage(2.0, 0, 11.0)
    assert usage["lab/a", "ada"] == Usage(3.5, 0, 20.0), "what is held now follows from the jobs"


def test_the_rules_in_force_are_the_last_that_were_applied(opened: Open, url: str) -> None:
    ledger = opened(url)
    assert ledger.policy() is None
    for name in ("first", "second"):
        applied = AppliedPolicy(replace(POLICY, default_queue=name), f"queues: {name}\n\0\ud800", "root", 5.0)
        ledger.commit(Batch(events=[row(PolicyChanged(5.0, applied.policy, "root"))], policy=applied))
    ledger.close()
    again = opened(url)
    assert again.policy() == again.load().policy == applied
    assert again.events()[-1].body["policy"]["queues"]["lab/a"]["weight"] == 2.5
    assert again.key == ledger.key


def test_cordons_are_kept_until_they_are_lifted(opened: Open, url: str) -> None:
    ledger = opened(url)
    odd = Cordon("n\0\udc80", 1.0, "ada\ud800", "why\0", True, 2.0)
    first = Cordon("n1", 5.0, "ada", "a fan is loud")
    ledger.commit(Batch(cordons={"n1": first, odd.node_id: odd, "n2": Cordon("n2", 6.0)}))
    ledger.commit(Batch(cordons={"n1": replace(first, draining=True), "n2": None, "n3": None}))
    ledger.close()
    assert {each.node_id: each for each in opened(url).load().cordons} == {
        "n1": replace(first, draining=True),
        odd.node_id: odd,
    }


@settings(deadline=None, max_examples=60)
@given(records(AppliedPolicy))
def test_every_policy_comes_back_as_it_was(applied: AppliedPolicy) -> None:
    stored = codec.encode_policy(applied)
    stored.encode()
    assert "\0" not in stored
    assert repr(codec.decode_policy(stored)) == repr(applied)


def test_an_array_is_counted_and_listed(opened: Open, url: str) -> None:
    ledger = opened(url)
    ledger.commit(submission(1))
    ledger.commit(array_of(12, 2))
    jobs = [each.job for each in ledger.members("j2")]
    assert [job.array_index for job in jobs] == list(range(12)), "by index, not by name"
    assert ledger.tally("j2") == {Status.QUEUED: 12}
    assert (ledger.tally("j1"), ledger.members("j1"), ledger.last_end("j2")) == ({}, [], None)
    done = [replace(ended(job), ended_at=3000.0 + job.seq) for job in jobs[:2]]
    ledger.commit(Batch(changed=[*done, admitted(jobs[2])]))
    assert ledger.tally("j2") == {Status.QUEUED: 9, Status.SUCCEEDED: 2, Status.RESERVING: 1}
    assert ledger.last_end("j2") == 3003.0
    assert len(ledger.events(array_id="j2")) == 12
    assert ledger.load().next_seq == 14


def test_the_latest_ended_jobs_are_there_to_learn_from(
    opened: Open, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rm.ledger.ledger.LEARNT_FROM", 3)
    ledger = opened(url)
    ledger.commit(submission(*range(1, 7)))
    order = [1, 5, 2, 6, 3]
    for at, seq in enumerate(order):
        ledger.commit(Batch(changed=[replace(ended(make_job(seq)), ended_at=float(at))]))
    assert [job.seq for job in ledger.load().ended] == [5, 6, 3], (
        "the newest by number, in the order of their ends"
    )
    assert [job.seq for job in ledger.load().jobs] == [4]
