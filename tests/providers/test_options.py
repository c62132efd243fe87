"""The provider's section of a cluster's YAML: what is refused, and what launches are refused."""

from __future__ import annotations

from typing import Any

import pytest

from rm.errors import InvalidSpec
from rm.providers.options import Failure, Options, check_name
from rm.providers.roster import Node, Roster

RAYS = {"type": "external", "module": "m", "_config_cache_path": "/tmp/x", "use_internal_ips": True}


def test_what_is_rays_is_left_to_ray() -> None:
    assert Options.of(RAYS) == Options()


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"capcity": {"gpu8": 1}}, "provider.capcity"),
        ({"capacity": {"gpu8": -1}}, "provider.capacity.gpu8"),
        ({"capacity": 3}, "provider.capacity"),
        ({"boot_delay_s": -1}, "provider.boot_delay_s"),
        ({"boot_delay_s": "soon"}, "provider.boot_delay_s"),
        ({"fail_types": {"gpu8": {"times": 0}}}, "provider.fail_types.gpu8.times"),
        ({"fail_types": {"gpu8": {"why": "x"}}}, "provider.fail_types.gpu8.why"),
        ({"fail_types": {"gpu8": {"category": "x" * 20}}}, "provider.fail_types.gpu8.category"),
        ({"fail_types": ["gpu8"]}, "provider.fail_types"),
    ],
)
def test_a_bad_field_is_named(section: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        Options.of({**RAYS, **section})
    assert (caught.value.field or "").startswith(field)
    assert field in str(caught.value)


@pytest.mark.parametrize(
    "section", [{"capacity": {"gpu9": 1}}, {"fail_types": {"gpu9": "x"}}, {"boot_delay_s": {"gpu9": 1}}]
)
def test_an_unknown_node_type_is_named(section: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec, match=r"gpu9: no such node type; known are gpu4, gpu8"):
        Options.of(section).check_types({"gpu4": {}, "gpu8": {}})


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a b", "-x", ".x", "a\n"])
def test_a_name_that_is_no_directory_is_refused(name: str) -> None:
    with pytest.raises(InvalidSpec, match="cluster_name"):
        check_name(name)


def test_capacity_is_for_all_or_none_and_counts_what_ends() -> None:
    options = Options.of({"capacity": {"gpu8": 3}})
    roster = Roster(nodes={"a": Node("gpu8", {}), "b": Node("gpu8", {}, ending=True), "c": Node("gpu4", {})})
    assert options.refusal("gpu8", 1, roster) is None
    assert options.refusal("gpu8", 2, roster) == (
        "NoCapacity", "gpu8: 2 asked for, 2 of 3 are in use (provider.capacity)",
    )  # fmt: skip
    assert options.refusal("gpu4", 100, roster) is None


def test_a_type_fails_as_often_as_it_should() -> None:
    options = Options.of(
        {"fail_types": {"gpu8": {"category": "NoStock", "message": "none", "times": 2}, "gpu4": "gone"}}
    )
    roster = Roster()
    assert [options.refusal("gpu8", 1, roster) for _ in range(3)] == [("NoStock", "none")] * 2 + [None]
    assert [options.refusal("gpu4", 1, roster) for _ in range(3)] == [("LaunchFailed", "gone")] * 3
    assert roster.refused == {"gpu8": 2, "gpu4": 3}
    assert options.fail_types["gpu4"] == Failure(message="gone")


def test_boot_delays_by_type_or_for_all() -> None:
    assert Options.of({"boot_delay_s": 2}).delay_s("any") == 2
    assert [Options.of({"boot_delay_s": {"gpu8": 5}}).delay_s(each) for each in ("gpu8", "gpu4")] == [5, 0]
