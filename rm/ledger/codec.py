"""Records and events as text, exactly: what is decoded equals what was encoded, whatever text it holds.

Two things that Python strings may hold do not fit into a database's text: lone surrogates (output of a
process that is no UTF-8; JSON has no place for them) and, in PostgreSQL, NUL. Both are written as MARK and four
hex digits. MARK is a code point that Unicode reserves for such private use; where it occurs by itself, it is
marked too. Text without any of them, which is nearly all, takes the direct way.

Values under `dict[str, Any]` (a reason's evidence, a spec's runtime_env) come back as JSON has them: a tuple is
a list then, and an object that JSON can't hold is its `str`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError, from_json, to_json

from rm.core.events import Event, JobSubmitted
from rm.core.model import Cordon, Job
from rm.ledger.rows import AppliedPolicy
from rm.spec import JobSpec

Record = TypeVar("Record")

MARK = "\ufdd0"
_UNSTORABLE = re.compile(f"[\0\ud800-\udfff{MARK}]")
_MARKED = re.compile(f"{MARK}([0-9a-f]{{4}})")

COLUMN_CHARS = 200
"""Most of a text that is stored in an indexed column: PostgreSQL refuses index entries above 2,700 bytes."""

PROGRESS_FIELDS = frozenset(
    {
        "status",
        "attempt",
        "attempts",
        "failures",
        "infra_failures",
        "evictions",
        "ran_s",
        "eligible_at",
        "queued_at",
        "first_started_at",
        "ended_at",
        "outcome",
        "reason",
    }
)
"""Fields of a Job that have their defaults when it is submitted: left out of JobSubmitted."""

EVENT_TYPES: dict[str, type[Event]] = {each.__name__: each for each in get_args(Event)}


def encode_job(job: Job) -> str:
    return _encode(job)


def decode_job(text: str) -> Job:
    """Raises ValueError (pydantic's) for text that is no Job."""
    return _decode(_JOB, text)


def encode_spec(spec: JobSpec) -> str:
    # Dumped as Python first: by itself, a pydantic model would write infinities as null.
    return _encode(spec.model_dump())


def decode_spec(text: str) -> JobSpec:
    """Raises ValueError (pydantic's) for text that is no JobSpec."""
    if MARK in text:
        return JobSpec.model_validate(_mapped(from_json(text), _restored))
    return JobSpec.model_validate_json(text)


def encode_policy(applied: AppliedPolicy) -> str:
    return _encode(applied)


def decode_policy(text: str) -> AppliedPolicy:
    """Raises ValueError (pydantic's) for text that is no policy."""
    return _decode(_POLICY, text)


def encode_cordon(cordon: Cordon) -> str:
    return _encode(cordon)


def decode_cordon(text: str) -> Cordon:
    """Raises ValueError (pydantic's) for text that is no cordon."""
    return _decode(_CORDON, text)


def encode_event(event: Event) -> str:
    """The event's body. JobSubmitted holds the request's own fields only: the rest has not happened yet."""
    return _encode(event, {"job": set(PROGRESS_FIELDS)} if isinstance(event, JobSubmitted) else None)


def decode_event(kind: str, text: str) -> Event:
    """The inverse of `encode_event`. Raises KeyError for a kind that this version does not know."""
    return _decode(_event_adapter(kind), text)


def event_fields(text: str) -> dict[str, Any]:
    """The body for readers: without what the row has columns for, and a submission's fields at top level."""
    body: dict[str, Any] = _mapped(from_json(text), _restored) if MARK in text else from_json(text)
    job = body.pop("job", None)
    if job is not None:
        del job["id"]
        body.update(job)
    for name in ("at", "job_id", "attempt"):
        body.pop(name, None)
    return body


def uncolumn(stored: str) -> str:
    """The inverse of `column` for text that fits one; a longer one comes back cut, as it is stored."""
    return _restored(stored)


def column(text: str) -> str:
    """`text` as it stands in an indexed column, for writing and for comparing. One to one, and short."""
    stored = _storable(text)
    if len(stored) <= COLUMN_CHARS:
        return stored
    digest = hashlib.sha256(stored.encode()).hexdigest()
    return f"{stored[: COLUMN_CHARS - len(digest) - 1]}…{digest}"


def moment(at: float) -> float:
    """A time as it stands in a column."""
    # SQLite stores NaN as NULL. The JSON beside it keeps what was said.
    return at if at == at else 0.0  # noqa: PLR0124 (NaN is the one value unlike itself)


def _encode(value: object, exclude: Mapping[str, set[str]] | None = None) -> str:
    try:
        # An odd object in a reason's evidence is no ground to lose an event: it is written as its str.
        text = to_json(value, exclude=exclude, serialize_unknown=True).decode()
    except PydanticSerializationError:
        pass  # a lone surrogate: the one thing left that can't be written
    else:
        if MARK not in text:
            return text
    marked = _mapped(value, _storable)
    return to_json(marked, exclude=exclude, serialize_unknown=True).decode()


def _decode(adapter: TypeAdapter[Record], text: str) -> Record:
    value = adapter.validate_json(text)
    if MARK in text:
        value = _mapped(value, _restored)
    return value


_JOB = TypeAdapter(Job)
_POLICY = TypeAdapter(AppliedPolicy)
_CORDON = TypeAdapter(Cordon)


@cache
def _event_adapter(kind: str) -> TypeAdapter[Event]:
    return TypeAdapter(EVENT_TYPES[kind])


def _storable(text: str) -> str:
    return _UNSTORABLE.sub(lambda match: f"{MARK}{ord(match[0]):04x}", text)


def _restored(text: str) -> str:
    # Enum members are strings too and must stay what they are.
    return _MARKED.sub(lambda match: chr(int(match[1], 16)), text) if MARK in text else text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` made to every string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{each.name: _mapped(getattr(value, each.name), change) for each in fields(value)}
        )
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_mapped(each, change) for each in value]
    if isinstance(value, tuple):
        return tuple(_mapped(each, change) for each in value)
    return value
