"""Requests: what is accepted, how it is cut into bundles, and what the refusals say."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm.core.model import Kind, NodeShape
from rm.core.resources import GPU_UNIT
from rm.core.shapes import resolve
from rm.errors import Infeasible, InvalidSpec, JobFailed, RmError
from rm.spec import Resources, build_spec, parse_bytes, parse_duration


def shapes(*gpus: int) -> list[NodeShape]:
    return [NodeShape(count, 64_000, 2**38, most=gpus.count(count)) for count in dict.fromkeys(gpus)]


@pytest.mark.parametrize(
    ("num_gpus", "nodes", "per_bundle", "count"),
    [
        (1, (8, 8), 1, 1),
        (8, (8, 8), 8, 1),
        (16, (8, 8), 8, 2),
        (12, (8, 8), 6, 2),
        (12, (4, 4, 4), 4, 3),
        (10, (4, 4, 4), 2, 5),
        (7, (4, 4), 1, 7),
        (0.5, (8,), 0.5, 1),
    ],
)
def test_a_count_becomes_the_fewest_equal_bundles(num_gpus, nodes, per_bundle, count) -> None:
    gang = resolve(Resources(num_gpus=num_gpus).request(), shapes(*nodes))
    assert (gang.bundle.gpu_units / GPU_UNIT, gang.count) == (per_bundle, count)


def test_num_gpus_over_nodes_is_divided() -> None:
    gang = resolve(Resources(num_gpus=4, nodes=2).request(), shapes(8, 8))
    assert (gang.bundle.gpu_units, gang.count) == (2 * GPU_UNIT, 2)


@pytest.mark.parametrize(
    ("resources", "nodes", "says"),
    [
        ({"num_gpus": 9}, (4, 4), "never have more than 8"),
        ({"gpus_per_node": 8}, (4, 4), "nodes=2, gpus_per_node=4"),
        ({"nodes": 3, "gpus_per_node": 4}, (4, 4), "never have more than 8"),
        ({"num_gpus": 1}, (0, 0), "no GPUs"),
        ({"num_gpus": 1}, (), "no nodes yet"),
        ({"num_gpus": 2, "nodes": 2, "strategy": "STRICT_SPREAD"}, (8,), "strategy"),
    ],
)
def test_what_can_never_be_held_is_refused_with_what_can(resources: dict, nodes: tuple, says: str) -> None:
    with pytest.raises(Infeasible, match=says):
        resolve(Resources(**resources).request(), shapes(*nodes))


def test_a_count_that_cannot_be_cut_names_counts_that_can() -> None:
    with pytest.raises(InvalidSpec, match="counts that would work: 4, 6, 8|counts that would work: 6, 8"):
        resolve(Resources(num_gpus=7, strategy="STRICT_SPREAD").request(), shapes(4, 4))


@given(st.integers(1, 64), st.lists(st.integers(1, 8), min_size=1, max_size=8))
def test_whatever_is_accepted_can_be_placed_and_has_the_count_asked_for(
    num_gpus: int, nodes: list[int]
) -> None:
    from rm.core.placement import feasible

    try:
        gang = resolve(Resources(num_gpus=num_gpus).request(), shapes(*nodes))
    except (Infeasible, InvalidSpec):
        assert num_gpus > sum(nodes) or num_gpus > max(nodes)
        return
    assert gang.gpu_units == num_gpus * GPU_UNIT
    assert feasible(gang, shapes(*nodes))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 90),
        ("90", 90),
        ("15m", 900),
        ("2h", 7200),
        ("1d", 86400),
        ("1:30:00", 5400),
        ("1-00:00:10", 86410),
    ],
)
def test_durations(text, seconds) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "-5", "5 weeks", float("inf"), float("nan"), -1, [], "1:2"])
def test_bad_durations(text) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_duration(text)


def test_bytes() -> None:
    assert parse_bytes("16GiB") == 16 * 2**30
    assert parse_bytes("512M") == 512 * 2**20
    assert parse_bytes(7) == 7
    with pytest.raises(ValueError, match="must be an amount"):
        parse_bytes("lots")


def test_every_bad_field_is_named_at_once() -> None:
    with pytest.raises(InvalidSpec) as caught:
        build_spec(kind=Kind.COMMAND, command=("x",), num_gpus=1, time_limit_s="soon", priority="urgent")
    assert "time_limit:" in str(caught.value)
    assert "priority:" in str(caught.value)


def test_a_spec_survives_json_and_pickle() -> None:
    spec = build_spec(kind=Kind.COMMAND, command=("x",), num_gpus=0.5, env={"A": "1"}, priority="high")
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_errors_survive_the_way_between_processes() -> None:
    error = JobFailed("j1 FAILED", job="j1", rank=2, tail=["x"])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is JobFailed
    assert (str(again), again.context) == (str(error), error.context)
    for kind in RmError.__subclasses__():
        assert str(pickle.loads(pickle.dumps(kind("text")))) == "text"
