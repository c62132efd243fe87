"""Whatever the core may say is stored as text and read back as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_batches import make_job, make_spec
from ledger_strategies import durable, events_of, has_default, jobs, json_values, text

from rm.core.events import Event, JobSubmitted
from rm.core.model import Job
from rm.ledger import codec


def same(found: object, meant: object) -> bool:
    """Equal in every part. By their repr: NaN equals nothing, and 1 is not 1.0."""
    return repr(found) == repr(meant)


@pytest.mark.parametrize("kind", durable.values(), ids=durable)
def test_every_durable_event_comes_back_as_it_was(kind: type[Event]) -> None:
    @settings(deadline=None, max_examples=60)
    @given(events_of(kind))
    def check(event: Event) -> None:
        body = codec.encode_event(event)
        body.encode()
        assert "\0" not in body
        assert same(codec.decode_event(kind.__name__, body), event)

    check()


@settings(deadline=None, max_examples=150)
@given(jobs)
def test_every_job_record_comes_back_as_it_was(job: Job) -> None:
    record = codec.encode_job(job)
    record.encode()
    assert "\0" not in record
    assert same(codec.decode_job(record), job)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda key: "=" not in key and "\0" not in key),
        st.text().filter(lambda value: "\0" not in value),
        max_size=3,
    ),
    st.dictionaries(text, json_values, max_size=3),
)
def test_every_spec_comes_back_as_it_was(env: dict[str, str], runtime_env: dict[str, Any]) -> None:
    spec = make_spec(env=env, runtime_env=runtime_env, time_limit_s="1h", gpu_type="A100,H100")
    stored = codec.encode_spec(spec)
    stored.encode()
    assert same(codec.decode_spec(stored), spec)


@settings(deadline=None)
@given(st.one_of(text, st.text(min_size=150)), st.one_of(text, st.text(min_size=150)))
def test_columns_take_any_text_and_keep_it_apart(one: str, other: str) -> None:
    stored = codec.column(one)
    stored.encode()
    assert "\0" not in stored
    assert len(stored) <= codec.COLUMN_CHARS
    assert (stored == codec.column(other)) == (one == other)


@pytest.mark.parametrize(
    "odd", [f"{codec.MARK}0041", codec.MARK, "\ud83d\ude00", "\\ud800", "\0", "\udc80" * 300], ids=ascii
)
def test_text_that_looks_like_our_own_marks_comes_back_too(odd: str) -> None:
    job = replace(make_job(1), name=odd, owner="\U0001f600")
    assert codec.decode_job(codec.encode_job(job)) == job
    assert codec.column(odd) != codec.column("A")


def test_plain_text_is_stored_as_it_is() -> None:
    assert codec.column("Zoë's job") == "Zoë's job"
    assert json.loads(codec.encode_job(make_job(7)))["name"] == "j7"


def test_a_submission_says_what_was_asked_for_and_nothing_more() -> None:
    body = json.loads(codec.encode_event(JobSubmitted(5.0, make_job(7))))
    assert body["job"]["gang"]["bundle"]["gpu_units"] == 20_000
    assert not codec.PROGRESS_FIELDS & set(body["job"])


def test_what_a_submission_leaves_out_has_a_default() -> None:
    assert all(has_default(name) for name in codec.PROGRESS_FIELDS)


def test_evidence_that_json_can_not_hold_does_not_lose_the_event() -> None:
    from rm.core.events import AvailabilityChecked
    from rm.core.reasons import Reason

    odd = Reason("Priority", "waits", {"who": frozenset({"j1"}), "what": object, "text": "\udc80"})
    body = codec.encode_event(AvailabilityChecked(1.0, "j2", odd))
    found = codec.decode_event("AvailabilityChecked", body)
    assert isinstance(found, AvailabilityChecked)
    assert found.reason is not None
    assert found.reason.evidence["text"] == "\udc80"


def test_a_field_that_a_later_version_adds_is_no_obstacle() -> None:
    record = json.loads(codec.encode_job(make_job(7)))
    assert codec.decode_job(json.dumps(record | {"invented_later": 1})) == make_job(7)


def test_a_field_that_an_earlier_version_lacked_has_its_default() -> None:
    record = json.loads(codec.encode_job(make_job(7)))
    del record["reason"], record["max_infra_retries"]
    assert codec.decode_job(json.dumps(record)) == make_job(7)
