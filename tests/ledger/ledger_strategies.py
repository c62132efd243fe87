"""Anything that the core's types allow, for Hypothesis: also text that no database likes."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from typing import Any, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from rm.core.events import JobSubmitted
from rm.core.model import Job
from rm.ledger.codec import EVENT_TYPES, MARK, PROGRESS_FIELDS

text = st.text(
    st.one_of(
        st.characters(),
        st.characters(categories=["Cs"]),
        st.sampled_from(f'\0{MARK}\ud800\udc00\udcff\\u"d8\n\u2028\U0001f600'),
    ),
    max_size=12,
)
numbers = st.floats(allow_nan=True, allow_infinity=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type, built from the type itself: a new field is covered on the day it is added."""
    if kind in (Any, object):
        return json_values
    if kind is type(None):
        return st.none()
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(0, 2**53)
    if kind is float:
        return numbers
    if kind is str:
        return text
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return st.sampled_from(list(kind))
    if is_dataclass(kind):
        return records(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return st.one_of([values(each) for each in inner])
    if origin is tuple and inner[-1] is Ellipsis:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(each) for each in inner))
    if origin in (dict, Mapping):
        return st.dictionaries(values(inner[0]), values(inner[1]), max_size=3)
    raise NotImplementedError(f"a field of type {kind}: teach this function about it")


def records(kind: type, leave: frozenset[str] = frozenset()) -> st.SearchStrategy[Any]:
    """Any record of a dataclass; fields in `leave` keep their defaults."""
    hints = get_type_hints(kind)
    return st.builds(
        kind, **{each.name: values(hints[each.name]) for each in fields(kind) if each.name not in leave}
    )


jobs = records(Job)
submitted_jobs = records(Job, leave=PROGRESS_FIELDS)
durable = {name: kind for name, kind in EVENT_TYPES.items() if kind.durable}


def events_of(kind: type) -> st.SearchStrategy[Any]:
    return st.builds(JobSubmitted, numbers, submitted_jobs) if kind is JobSubmitted else records(kind)


events = st.one_of([events_of(kind) for kind in durable.values()])


def has_default(name: str) -> bool:
    field = next(each for each in fields(Job) if each.name == name)
    return field.default is not MISSING or field.default_factory is not MISSING
