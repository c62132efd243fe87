"""What the ledger promises, on every kind of database."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_batches import admission, admitted, ended, make_job, make_spec, row, submission
from ledger_strategies import events, jobs
from sqlalchemy import text

from rm.core.events import Event, NodeJoined, ReserveFailed, RunExited
from rm.core.fairshare import Usage
from rm.core.model import Job, Outcome, Status
from rm.errors import LedgerUnavailable, UnknownJob
from rm.ledger import Accepted, Batch, Ledger
from rm.ledger.codec import decode_event

Open = Callable[[str], Ledger]


def everything(ledger: Ledger) -> tuple[object, ...]:
    return ledger.jobs(limit=10_000), ledger.events(limit=10_000), ledger.load()


def run(ledger: Ledger, statement: str) -> None:
    with ledger._database.transaction() as connection:
        connection.execute(text(statement))


# --- life --------------------------------------------------------------------------------------------------


def test_a_new_ledger_is_empty(ledger: Ledger) -> None:
    assert ledger.load().jobs == []
    assert ledger.load().next_seq == 1
    assert ledger.events() == []
    assert ledger.count_events() == 0


def test_the_newest_time_is_that_of_the_latest_events_and_of_the_use(ledger: Ledger) -> None:
    assert ledger.newest() == 0
    ledger.commit(submission(1, 2, 3))
    assert ledger.newest() == 1003.0
    ledger.commit(Batch(events=[row(NodeJoined(900.0, "n", "n", 8, 0, 0))]))
    assert ledger.newest() == 1003.0, "an event may be committed a little after a later one"
    ledger.commit(Batch(usage=[(("default", "ann"), Usage(1.0, 0, 1500.5))]))
    assert ledger.newest() == 1500.5


def test_the_requests_of_many_jobs_in_one_reading(ledger: Ledger) -> None:
    ledger.commit(submission(1, name="first"))
    ledger.commit(submission(2, name="second"))
    assert {job_id: spec.name for job_id, spec in ledger.specs(["j2", "j1", "j3"]).items()} == {
        "j1": "first",
        "j2": "second",
    }
    assert ledger.specs([]) == {}


def test_the_blobs_that_live_jobs_need(ledger: Ledger) -> None:
    payload, code, gone = "a" * 64, "b" * 64, "c" * 64
    ledger.commit(submission(1, kind="function", payload_sha256=payload, working_dir_sha256=code))
    ledger.commit(submission(2, kind="function", payload_sha256=gone))
    ledger.commit(submission(*range(3, 2_200)))
    ledger.commit(submission(2_200, working_dir_sha256="d" * 64))
    ledger.commit(Batch(changed=[ended(make_job(2))]))
    assert ledger.blobs_of_live_jobs() == {payload, code, "d" * 64}


def test_the_key_is_drawn_once(opened: Open, url: str) -> None:
    ledger = opened(url)
    key = ledger.key
    assert re.fullmatch("[0-9a-f]{6}", key)
    ledger.close()
    assert opened(url).key == key


def test_what_was_committed_is_there_after_reopening(opened: Open, url: str) -> None:
    ledger = opened(url)
    ledger.commit(submission(1, 2, 3))
    ledger.commit(admission(make_job(2)))
    before = everything(ledger)
    ledger.close()
    assert everything(opened(url)) == before


def test_a_closed_ledger_says_so(ledger: Ledger) -> None:
    ledger.close()
    ledger.close()
    for call in (ledger.load, ledger.count_events, lambda: ledger.commit(submission(1))):
        with pytest.raises(LedgerUnavailable, match="is closed"):
            call()


# --- writing -----------------------------------------------------------------------------------------------


def test_jobs_that_ended_are_kept_and_not_loaded(ledger: Ledger) -> None:
    ledger.commit(submission(1, 2, 3))
    ledger.commit(Batch(changed=[ended(make_job(1)), ended(make_job(3), Status.FAILED)]))
    loaded = ledger.load()
    assert loaded.jobs == [make_job(2)]
    assert loaded.next_seq == 4
    row_of_1 = ledger.job("j1")
    assert row_of_1 is not None
    assert row_of_1.job == ended(make_job(1))


def test_a_job_accepted_and_changed_in_one_batch_has_its_last_record(ledger: Ledger) -> None:
    both = submission(1, 2)
    ledger.commit(replace(both, changed=[admitted(make_job(1)), make_job(2)]))
    assert ledger.load().jobs == [admitted(make_job(1)), make_job(2)]


def test_the_last_of_several_records_in_a_batch_counts(ledger: Ledger) -> None:
    ledger.commit(submission(1))
    ledger.commit(Batch(changed=[admitted(make_job(1)), ended(make_job(1))]))
    assert [each.job for each in ledger.jobs()] == [ended(make_job(1))]


def test_an_empty_batch_changes_nothing(ledger: Ledger) -> None:
    ledger.commit(Batch())
    assert ledger.count_events() == 0


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(submission(2, 3, 1, key="new-{}"), id="an id twice"),
        pytest.param(submission(2, 3, 4, key="key-1"), id="a key twice"),
        pytest.param(replace(submission(2), changed=[make_job(9)]), id="a job that is not there"),
        pytest.param(
            replace(submission(2), events=[row(ReserveFailed(1.0, "j2", 2**70, "no such number"))]),
            id="a number that fits no column",
        ),
    ],
)
def test_a_batch_is_written_whole_or_not_at_all(ledger: Ledger, broken: Batch) -> None:
    ledger.commit(submission(1))
    before = everything(ledger)
    with pytest.raises(LedgerUnavailable):
        ledger.commit(broken)
    assert everything(ledger) == before
    ledger.commit(submission(2, 3))
    assert [job.id for job in ledger.load().jobs] == ["j1", "j2", "j3"]


def test_messages_repeat_nothing_that_users_gave(ledger: Ledger) -> None:
    ledger.commit(submission(1, env={"TOKEN": "hunter2"}))
    with pytest.raises(LedgerUnavailable) as caught:
        ledger.commit(submission(1, env={"TOKEN": "hunter2"}, key="new-{}"))
    assert "hunter2" not in str(caught.value)
    run(ledger, """UPDATE jobs SET spec = '{"kind": "command", "env": {"TOKEN": ["hunter2"]}}'""")
    with pytest.raises(LedgerUnavailable, match="record of j1 can't be read") as caught:
        ledger.job("j1")
    assert "hunter2" not in str(caught.value)


def test_the_history_never_holds_an_environment(ledger: Ledger) -> None:
    ledger.commit(submission(1, env={"TOKEN": "hunter2"}))
    assert "hunter2" not in repr(ledger.events())
    assert ledger.spec("j1").env == {"TOKEN": "hunter2"}


def test_text_that_databases_do_not_take_comes_back_as_it_was(ledger: Ledger) -> None:
    odd = "\0 \udc80 \ud800\udc00 \ufdd0 \U0001f600"
    spec = make_spec()
    job = replace(make_job(1, spec), owner=odd * 300, name=odd)
    last = replace(ended(job), outcome=Outcome(Status.FAILED, odd, tail=(odd, "plain")))
    assert last.outcome is not None
    ledger.commit(Batch([Accepted(job, spec, odd)], [], [job]))
    ledger.commit(Batch([], [row(RunExited(1.0, "j1", 1, last.outcome))], [last]))
    found = ledger.job("j1")
    assert found is not None
    assert found.job == last
    assert [each.job.id for each in ledger.jobs(owner=odd * 300, name=odd)] == ["j1"]
    assert ledger.jobs(owner=odd * 299) == []
    assert ledger.submitted([odd, "other"]) == {odd: "j1"}
    assert ledger.events()[0].body["outcome"]["tail"] == [odd, "plain"]


def test_times_that_are_no_numbers_do_no_harm(ledger: Ledger) -> None:
    spec = make_spec()
    for seq, at in enumerate((float("nan"), float("inf"), float("-inf")), 1):
        job = replace(make_job(seq, spec), submitted_at=at, eligible_at=at)
        ledger.commit(
            Batch([Accepted(job, spec, f"key-{seq}")], [row(ReserveFailed(at, job.id, 1, "why"))], [job])
        )
    assert [repr(job.submitted_at) for job in ledger.load().jobs] == ["nan", "inf", "-inf"]
    assert [each.at for each in ledger.events()] == [0.0, float("inf"), float("-inf")]
    assert ledger.newest() == 0.0


def test_everything_that_the_core_may_say_survives_the_database(ledger: Ledger) -> None:
    taken = 0
    spec = make_spec()

    @settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
    @given(st.lists(events, max_size=4), st.lists(jobs, max_size=3))
    def check(said: list[Event], records: list[Job]) -> None:
        nonlocal taken
        named = [replace(job, id=f"j{taken + i}", seq=taken + i) for i, job in enumerate(records, 1)]
        taken += len(named)
        seen = ledger.count_events()
        ledger.commit(
            Batch(
                [Accepted(job, spec, f"key-{job.id}") for job in named], [row(each) for each in said], named
            )
        )
        found = [ledger.job(job.id) for job in named]
        assert repr([each and each.job for each in found]) == repr(named)
        with ledger._database.reading() as connection:
            rows = connection.execute(
                text(f"SELECT kind, body FROM events ORDER BY seq LIMIT 99 OFFSET {seen}")
            )
            assert repr([decode_event(*each) for each in rows]) == repr(said)

    check()


def test_a_batch_of_a_thousand_jobs(ledger: Ledger) -> None:
    began = time.monotonic()
    ledger.commit(submission(*range(1, 1001)))
    ledger.commit(admission(*(make_job(seq) for seq in range(1, 1001))))
    assert time.monotonic() - began < 30  # about 0.15 s on two cores
    assert len(ledger.load().jobs) == 1000
    assert ledger.count_events() == 2000


# --- reading -----------------------------------------------------------------------------------------------


def test_one_job(ledger: Ledger) -> None:
    ledger.commit(submission(1, 2, name="train"))
    found = ledger.job("j2")
    assert found is not None
    assert found.job == make_job(2, make_spec(name="train"))
    assert found.spec == ledger.spec("j2") == make_spec(name="train")
    assert ledger.job("j3") is None
    with pytest.raises(UnknownJob, match="'j3'"):
        ledger.spec("j3")


def test_jobs_are_listed_by_status_owner_and_name(ledger: Ledger) -> None:
    ledger.commit(submission(1, 2, owner="ann", name="a"))
    ledger.commit(submission(3, 4, owner="bob", name="b"))
    ledger.commit(
        Batch(
            changed=[
                ended(make_job(1, make_spec(owner="ann", name="a"))),
                admitted(make_job(4, make_spec(owner="bob", name="c"))),
            ]
        )
    )

    def ids(**chosen: object) -> list[str]:
        return [each.job.id for each in ledger.jobs(**chosen)]

    assert ids() == ["j4", "j3", "j2", "j1"]
    assert ids(newest_first=False) == ["j1", "j2", "j3", "j4"]
    assert ids(limit=2) == ["j4", "j3"]
    assert ids(owner="ann") == ["j2", "j1"]
    assert ids(owner="ann", statuses=[Status.SUCCEEDED]) == ["j1"]
    assert ids(statuses=[Status.SUCCEEDED, Status.RESERVING]) == ["j4", "j1"]
    assert ids(name="b") == ["j3"]
    assert ids(name="c", owner="bob", statuses=list(Status)) == ["j4"]
    assert ids(statuses=[]) == ids(owner="") == []


def test_events_are_read_in_order_and_in_pieces(ledger: Ledger) -> None:
    ledger.commit(submission(1, 2))
    ledger.commit(admission(make_job(1)))
    ledger.commit(Batch(events=[row(NodeJoined(5.0, "n1", "node-1", 8, 64_000, 2**39))]))
    told = ledger.events()
    assert [each.kind for each in told] == ["JobSubmitted", "JobSubmitted", "JobAdmitted", "NodeJoined"]
    assert [each.seq for each in told] == sorted({each.seq for each in told})
    assert ledger.events(after=told[1].seq) == told[2:]
    assert ledger.events(limit=2) == told[:2]
    assert ledger.events(job_id="j1") == [told[0], told[2]]
    assert ledger.events(job_id="j1", after=told[0].seq, limit=1) == [told[2]]
    assert ledger.events(job_id="j9") == []
    assert ledger.count_events() == 4


def test_an_event_shows_the_gpus_before_and_after_it(ledger: Ledger) -> None:
    ledger.commit(submission(1))
    ledger.commit(admission(make_job(1)))
    submitted, given_ = ledger.events()
    assert submitted.body["gang"]["bundle"]["gpu_units"] == 20_000
    assert submitted.body["name"] == "j1"
    assert (given_.job_id, given_.attempt, given_.at) == ("j1", 1, 2000.0)
    assert given_.body == {"placed": [{"node_id": "node-1", "slots": [0, 1]}], "gpu_type": None}
    assert (given_.free_before, given_.free_after) == (8, 6)
    assert (given_.charged_before, given_.charged_after) == (0, 2)


def test_submissions_are_known_by_their_keys(ledger: Ledger) -> None:
    ledger.commit(submission(*range(1, 2502)))
    keys = [f"key-{seq}" for seq in range(2, 2600)]
    assert ledger.submitted(keys) == {f"key-{seq}": f"j{seq}" for seq in range(2, 2502)}
    assert ledger.submitted([]) == {}


# --- at the same time --------------------------------------------------------------------------------------


def test_reads_do_not_wait_for_a_commit(ledger: Ledger) -> None:
    ledger.commit(submission(1))
    with ledger._database.transaction() as connection:
        connection.execute(text("UPDATE jobs SET status = 'RUNNING'"))
        connection.execute(text("DELETE FROM events"))
        began = time.monotonic()
        assert [each.job.id for each in ledger.jobs(statuses=[Status.QUEUED])] == ["j1"]
        assert ledger.count_events() == 1
        assert time.monotonic() - began < 1


def test_readers_see_whole_batches_while_the_writer_writes(ledger: Ledger) -> None:
    done = threading.Event()
    wrong: list[object] = []
    reads = [0] * 3

    def read(which: int) -> None:
        try:
            while not done.is_set():
                for each in ledger.jobs(limit=20):
                    kinds = [event.kind for event in ledger.events(each.job.id)]
                    told = ["JobSubmitted", "JobAdmitted"][: 1 + (each.job.status is Status.RESERVING)]
                    if kinds[: len(told)] != told:
                        wrong.append((each.job.id, each.job.status, kinds))
                reads[which] += 1
        except Exception as error:
            wrong.append(error)

    readers = [threading.Thread(target=read, args=(which,)) for which in range(3)]
    for reader in readers:
        reader.start()
    for seq in range(1, 120, 2):
        ledger.commit(submission(seq, seq + 1))
        ledger.commit(admission(make_job(seq), make_job(seq + 1)))
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert all(reads)


def test_commits_from_several_threads_take_turns(ledger: Ledger) -> None:
    wrong: list[Exception] = []

    def write(first: int) -> None:
        try:
            for seq in range(first, first + 20):
                ledger.commit(submission(seq))
        except Exception as error:
            wrong.append(error)

    writers = [threading.Thread(target=write, args=(first,)) for first in (1, 101, 201)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert wrong == []
    assert len(ledger.load().jobs) == ledger.count_events() == 60


def test_two_that_create_the_same_ledger_get_the_same_one(opened: Open, url: str) -> None:
    keys: list[object] = []

    def create() -> None:
        try:
            keys.append(opened(url).key)
        except Exception as error:
            keys.append(error)

    creators = [threading.Thread(target=create) for _ in range(4)]
    for creator in creators:
        creator.start()
    for creator in creators:
        creator.join()
    assert len(keys) == 4
    assert len(set(keys)) == 1, keys
