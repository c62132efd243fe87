"""rm.yaml: what is read from it, and what each mistake is answered with."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.core.policy import ANY, Backfill, Order, Policy, Preempt, QueuePolicy, Reclaim
from rm.core.resources import GPU_UNIT
from rm.errors import InvalidSpec
from rm.settings import Settings

TREE = """
queues:
  research:
    preempt: lower
    max_time_limit: 2d
    labels: {zone: a}
    queues:
      nlp: {nominal: {A100: 4, "*": 2}, lend_limit: 1, weight: 2, default_priority: low}
      vision:
        nominal: 8
        preempt: never
        labels: {rack: r1}
        max_gpus_per_owner: 4
  batch:
default_queue: batch
order: fair
backfill: skip
half_life: 1-12:00:00
max_age: 1:30:00
min_runtime: 10m
settle: 2m
predicted_limits: yes
node_failures: {limit: 5, window: 1h}
admins: [ada, bob, ada]
"""


def test_a_whole_file_becomes_a_policy() -> None:
    settings = Settings.parse(TREE)
    policy = settings.policy()
    assert list(policy.queues) == ["research", "nlp", "vision", "batch"]
    assert policy.leaves() == ("nlp", "vision", "batch")
    assert policy.queues["nlp"] == QueuePolicy(
        "nlp",
        "research",
        nominal={"A100": 4 * GPU_UNIT, ANY: 2 * GPU_UNIT},
        lend_limit={ANY: GPU_UNIT},
        weight=2,
        preempt=Preempt.LOWER,
        labels=(("zone", "a"),),
        max_time_limit_s=172_800,
        default_priority=-100,
    )
    vision = policy.queues["vision"]
    assert (vision.preempt, vision.max_gpus_per_owner) == (Preempt.NEVER, 4 * GPU_UNIT)
    assert vision.labels == (("rack", "r1"), ("zone", "a"))
    assert policy.queues["batch"] == QueuePolicy("batch")
    assert (policy.default_queue, policy.order, policy.backfill) == ("batch", Order.FAIR, Backfill.SKIP)
    assert (policy.half_life_s, policy.max_age_s, policy.min_runtime_s) == (129_600, 5400, 600)
    assert policy.settle_s == 120
    assert (policy.node_failure_limit, policy.node_failure_window_s) == (5, 3600)
    assert policy.predicted_limits
    assert settings.admins == ("ada", "bob")


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "queues:", "queues: {}", "---\n...\n", "\ufeff"])
def test_an_empty_file_is_one_queue_without_limits(text: str) -> None:
    assert Settings.parse(text).policy() == Policy()


@pytest.mark.parametrize(
    ("text", "default"),
    [
        ("queues: {a: }", "a"),
        ("queues: {a: , default: }", "default"),
        ("queues: {team: {queues: {x: }}}", "x"),
        ("queues: {a: , b: }\ndefault_queue: b", "b"),
    ],
)
def test_the_default_queue_is_found_where_there_is_no_choice(text: str, default: str) -> None:
    assert Settings.parse(text).policy().default_queue == default


def test_a_stopped_team_stops_all_below_it() -> None:
    policy = Settings.parse(
        "queues: {t: {stopped: true, queues: {a: {stopped: false}, b: }}, c: }\ndefault_queue: c"
    )
    assert [queue.stopped for queue in policy.policy().queues.values()] == [True, True, True, False]


def test_anchors_save_writing() -> None:
    policy = Settings.parse(
        "queues: {a: {nominal: &all {A100: 2}}, b: {nominal: *all}}\ndefault_queue: a"
    ).policy()
    assert policy.queues["a"].nominal == policy.queues["b"].nominal == {"A100": 2 * GPU_UNIT}


def test_keys_are_text_as_written() -> None:
    policy = Settings.parse("queues: {no: , 2024-01-01: , 007: }\ndefault_queue: '007'").policy()
    assert list(policy.queues) == ["no", "2024-01-01", "007"]


BAD = [
    # (text, the field, words of the message)
    ("queues: {research: {nominal: {A100: x}}}", "queues.research.nominal.A100", "must be a number of GPUs, not 'x'"),
    ("queues: {a: {nominal: -1}}", "queues.a.nominal", "must be from 0 to 1000000 GPUs, not -1"),
    ("queues: {a: {nominal: true}}", "queues.a.nominal", "must be a number of GPUs"),
    ("queues: {a: {nominal: many}}", "queues.a.nominal", "a number for each GPU type, not 'many'"),
    ("queues: {a: {nominal: }}", "queues.a.nominal", "is empty: give a value, or leave the line out"),
    ("queues: {a: {nominal: {}}}", "queues.a.nominal", "is empty: leave it out, or say 0"),
    ("queues: {a: {nominal: .nan}}", "queues.a.nominal", "must be from 0"),
    ("queues: {a: {nominal: .inf}}", "queues.a.nominal", "must be from 0"),
    ("queues: {a: {nominal: 1.5}}", "queues.a.nominal", "whole number of GPUs, not 1.5"),
    ("queues: {a: {nominal: 0.00001}}", "queues.a.nominal", "can't be accounted"),
    ("queues: {a: {nominal: 010}}", "queues.a.nominal", "not '010'"),
    ("queues: {a: {nominal: {'': 1}}}", "queues.a.nominal.", "must be a GPU type"),
    ("queues: {a: {borrow_limit: [1]}}", "queues.a.borrow_limit", "must be a number of GPUs"),
    ("queues: {a: {lend_limit: {A100: }}}", "queues.a.lend_limit.A100", "not empty"),
    ("queues: {a: {weight: 0}}", "queues.a.weight", "from 0.000001 to 1000000, not 0"),
    ("queues: {a: {weight: heavy}}", "queues.a.weight", "must be a number"),
    ("queues: {a: {preempt: always}}", "queues.a.preempt", "must be one of never, lower, not 'always'"),
    ("queues: {a: {reclaim: true}}", "queues.a.reclaim", "must be one of never, lower, any, not True"),
    ("queues: {a: {stopped: 1}}", "queues.a.stopped", "must be true or false, not 1"),
    ("queues: {a: {labels: [x]}}", "queues.a.labels", "names and values of node labels"),
    ("queues: {a: {labels: {zone: 1}}}", "queues.a.labels", "must be text, not 1; quotes make it so"),
    ("queues: {a: {max_time_limit: 0}}", "queues.a.max_time_limit", "must be more than 0 seconds"),
    ("queues: {a: {max_time_limit: soon}}", "queues.a.max_time_limit", "must be a duration such as"),
    ("queues: {a: {max_time_limit: 1:30}}", "queues.a.max_time_limit", "must be a duration such as"),
    ("queues: {a: {default_time_limit: true}}", "queues.a.default_time_limit", "must be a duration"),
    ("queues: {a: {default_priority: urgent}}", "queues.a.default_priority", "must be one of low, normal, high"),
    ("queues: {a: {default_priority: 2000000}}", "queues.a.default_priority", "from -1000000"),
    ("queues: {a: {max_gpus_per_owner: {A100: 1}}}", "queues.a.max_gpus_per_owner", "must be a number of GPUs"),
    ("queues: {a: {nominel: 1}}", "queues.a.nominel", "unknown field; did you mean 'nominal'?"),
    ("queues: {a: {zzz: 1}}", "queues.a.zzz", "known are borrow_limit, default_priority"),
    ("queues: {a: {parent: b}}", "queues.a.parent", "stands below `queues:` of its parent"),
    ("queus: {}", "queus", "unknown field; did you mean 'queues'?"),
    ("queues: [a]", "queues", "must be queues by name, not ['a']"),
    ("queues: {a: 3}", "queues.a", "must be the fields of a queue, not 3"),
    ("queues: {'a b': }", "queues.a b", "must be a queue's name"),
    ("queues: {'': }", "queues.", "must be a queue's name"),
    ("order: fiar", "order", "must be one of fair, fifo, shortest_first, not 'fiar'"),
    ("order: ", "order", "not empty"),
    ("backfill: null", "backfill", "must be one of easy, skip, none, not empty"),
    ("half_life: 0", "half_life", "must be more than 0"),
    ("max_age: -3", "max_age", "must be a duration"),
    ("min_runtime: 9999999999999999:00:00", "min_runtime", "at most 100 years"),
    ("settle: -1", "settle", "must be a duration such as 90"),
    ("settle: ", "settle", "not empty"),
    ("node_failures: 3", "node_failures", "must be `limit` and `window`, such as {limit: 3, window: 10m}, not 3"),
    ("node_failures: {limit: 1}", "node_failures.limit", "must be from 2 to 1000 failures, or 0 for never, not 1"),
    ("node_failures: {limit: -2}", "node_failures.limit", "not -2"),
    ("node_failures: {limit: true}", "node_failures.limit", "not True"),
    ("node_failures: {limit: }", "node_failures.limit", "not empty"),
    ("node_failures: {window: 0}", "node_failures.window", "must be more than 0"),
    ("node_failures: {windows: 5m}", "node_failures.windows", "unknown field; did you mean 'window'?"),
    ("predicted_limits: maybe", "predicted_limits", "must be true or false, not 'maybe'"),
    ("admins: ada", "admins", "must be a list of owners such as [ada, bob], not 'ada'"),
    ("admins: [1]", "admins", "must be a list of owners"),
    ("default_queue: 3", "default_queue", "must be text, not 3"),
    ("default_queue: gpu", "default_queue", "there is no queue 'gpu'; known are default"),
    ("queues: {nlp: , cv: }\ndefault_queue: nip", "default_queue", "did you mean 'nlp'?"),
    ("queues: {a: , b: }", "default_queue", "is missing: say which of a, b"),
    ("queues: {t: {queues: {a: }}}\ndefault_queue: t", "default_queue", "jobs go only to those that have none: a"),
    ("queues: {t: {queues: {a: }}, a: }", "queues.a", "the name is taken by queues.t.queues.a"),
    ("queues: {t: {queues: {t: }}}", "queues.t.queues.t", "the name is taken by queues.t"),
    ("queues: {t: {max_gpus_per_owner: 1, queues: {a: }}}", "queues.t.max_gpus_per_owner", "set it on each of a"),
    ("queues: {a: {max_time_limit: 1h, default_time_limit: 2h}}", "queues.a.default_time_limit", "above the maximum"),
    ("queues: {t: {default_time_limit: 2h, queues: {a: {max_time_limit: 1h}}}}",
     "queues.t.queues.a.max_time_limit", "above the maximum"),
    ("queues: " + "".join(f"{{q{n}: {{queues: " for n in range(11)) + "{}" + "}}" * 11,
     "queues." + ".queues.".join(f"q{n}" for n in range(11)), "at most 10 levels"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "field", "words"), BAD, ids=[field for _, field, _ in BAD])
def test_every_bad_field_is_named(text: str, field: str, words: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        Settings.parse(text)
    assert caught.value.message.startswith(f"{field}: ")
    assert words in caught.value.message
    assert caught.value.field == field


def test_all_faults_are_told_at_once_each_with_its_line() -> None:
    with pytest.raises(InvalidSpec) as caught:
        Settings.parse("queues:\n  a:\n    nominal: x\n  b:\n    weigth: 2\norder: fair\nhalf_life: never\n")
    assert [each.rpartition(" ")[2] for each in caught.value.message.split("; ") if "(line" in each] == [
        "3)", "5)", "7)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "line 1, column 5"),
        ("queues:\n  a: 1\n b: 2\n", "line 3, column 2"),
        ("queues:\n\t- b", "line 2, column 1: found character '\\t' that cannot start any token; indent with spaces"),
        ("queues:\n  a:\n  a:\n", "line 3, column 3: queues.a stands here a second time"),
        ("order: fair\norder: fifo", "line 2, column 1: order stands here a second time"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: the tag python/object/apply:os.system is"),
        ("a: !!int x", "line 1, column 4: 'x' is not a value of its tag"),
        ("a: !!bool x", "line 1, column 4: 'x' is not a value of its tag"),
        ("a: !mine {}", "line 1, column 4: the tag !mine is not understood"),
        ("a: \x07", "line 1, column 4: the character '\\x07' is not allowed"),
        ("--- 1\n--- 2", "line 2, column 1: but found another document"),
        ("queues: &x {a: {queues: *x}}", "contains itself"),
        ("? [a]\n: b", "line 1, column 3: a key must be a word"),
        ("a: *b", "undefined alias"),
        ("[" * 3000, "nested too deeply"),
        ("a: &a [x, x, x, x, x, x, x, x]\n"
         + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
         "more than 100000 values"),
        ("#" * 2**21, "more than 1048576 characters"),
        ("- a", "must be fields and values"),
        ("hello", "must be fields and values"),
    ],
)  # fmt: skip
def test_what_is_no_yaml_is_told_with_its_place(text: str, words: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        Settings.parse(text)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("queues: {a: {nominal: 4, lend_limit: 6}}", "queues.a.lend_limit: 6 is more than the 4 that a owns"),
        ("queues: {a: {nominal: {A100: 1}, lend_limit: {A100: 2}}}", "queues.a.lend_limit.A100: 2 is more than the 1"),
        ("queues: {a: {borrow_limit: 2}}", "queues.a.borrow_limit: no queue has a nominal quota"),
        ("queues: {a: {nominal: 4}, b: {borrow_limit: 0}}\ndefault_queue: a", "it can never hold any"),
        ("queues: {a: {nominal: 4}, b: {nominal: {A100: 2}}}\ndefault_queue: a",
         "queues.a.nominal: A100 is counted apart, because a quota names it; none of it is owned by a"),
        ("queues: {t: {nominal: 8, queues: {a: {nominal: 4}, b: {nominal: 4}}}}\ndefault_queue: a",
         "queues.t.nominal: is in addition to the 8 of its queues, 16 together"),
        ("queues: {a: {stopped: true}}", "default_queue: a is stopped"),
        ("queues: {a: {weight: 2}}\norder: fifo", "queues.a.weight: has no effect with order: fifo"),
        ("queues: {a: }\norder: fifo\nhalf_life: 1d", "half_life: has no effect with order: fifo"),
        ("queues: {a: }\nbackfill: none\npredicted_limits: true", "predicted_limits: has no effect"),
    ],
)  # fmt: skip
def test_what_is_probably_not_meant_is_a_warning(text: str, words: str) -> None:
    (warning,) = Settings.parse(text).warnings()
    assert words in warning


def test_a_team_may_lend_what_its_queues_lend() -> None:
    text = "queues: {t: {lend_limit: 6, queues: {a: {nominal: 8}}}}"
    assert Settings.parse(text).warnings() == []
    text = "queues: {t: {lend_limit: 6, queues: {a: {nominal: 8, lend_limit: 5}}}}"
    assert "queues.t.lend_limit: 6 is more than the 5 that t owns" in Settings.parse(text).warnings()[0]


# --- any file ----------------------------------------------------------------------------------------------

gpus = st.one_of(st.integers(0, 64), st.sampled_from([0.25, 0.5]))
amounts = st.one_of(
    gpus, st.dictionaries(st.sampled_from(["*", "A100", "H100", "no", "1e3"]), gpus, min_size=1, max_size=3)
)
spans = st.one_of(st.integers(1, 10**6), st.sampled_from(["90s", "2h", "1:30:00", "1-12:00:00", "0.5d"]))


def queue_fields(below: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "nominal": amounts,
            "borrow_limit": amounts,
            "lend_limit": amounts,
            "weight": st.floats(0.01, 100),
            "preempt": st.sampled_from([str(each) for each in Preempt]),
            "reclaim": st.sampled_from([str(each) for each in Reclaim]),
            "stopped": st.booleans(),
            "labels": st.dictionaries(st.sampled_from(["zone", "yes"]), st.sampled_from(["a", "1", "true"])),
            "max_time_limit": spans,
            "default_priority": st.one_of(st.integers(-10, 10), st.just("high")),
            "queues": st.lists(below, min_size=1, max_size=3),
        },
    )


trees = st.recursive(queue_fields(st.nothing()), queue_fields, max_leaves=6)


def named(fields: dict[str, Any], count: list[int]) -> dict[str, Any]:
    """The same with a name for each queue."""
    below = fields.get("queues")
    if not below:
        return fields
    return {**fields, "queues": {f"q{count.append(0) or len(count)}": named(each, count) for each in below}}


files = st.builds(
    lambda queues, rules: named({**rules, "queues": queues}, []),
    st.lists(trees, max_size=4),
    st.fixed_dictionaries(
        {},
        optional={
            "order": st.sampled_from([str(each) for each in Order]),
            "backfill": st.sampled_from([str(each) for each in Backfill]),
            "half_life": spans,
            "max_age": spans,
            "min_runtime": spans,
            "settle": spans,
            "predicted_limits": st.booleans(),
            "admins": st.lists(st.sampled_from(["ada", "yes", "1"])),
        },
    ),
)


@settings(deadline=None)
@given(files)
def test_what_is_written_is_what_is_read(raw: dict[str, Any]) -> None:
    leaf = raw["queues"] or {}
    while leaf:
        name, fields = next(iter(leaf.items()))
        leaf = fields.get("queues") or {}
        raw["default_queue"] = name
    if not raw["queues"]:
        raw["queues"] = {}
    settings = Settings.parse(yaml.safe_dump(raw))
    again = Settings.parse(yaml.safe_dump(settings.model_dump(mode="json", exclude_none=True)))
    assert again == settings
    assert again.policy() == settings.policy()
    assert all(": " in each for each in settings.warnings())
    policy = settings.policy()
    assert policy.default_queue in policy.leaves()
    assert all(queue.parent is None or queue.parent in policy.queues for queue in policy.queues.values())


MARKS = "queues default_queue nominal a b : , { } [ ] - & * ! !!int !!float !!bool | > # ' \" ? -1 .nan true null ~ %"
words = st.sampled_from([*MARKS.split(), "\n", "\t"])


@settings(deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(words, max_size=40).map(" ".join)))
def test_any_text_is_settings_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(InvalidSpec):
        Settings.parse(text).policy()
