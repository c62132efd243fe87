"""Which node a word means."""

from __future__ import annotations

import pytest

from rm.core.model import Node
from rm.core.resources import Devices
from rm.errors import UnknownNode
from rm.runtime.node_names import named


def node(node_id: str, name: str) -> Node:
    return Node(node_id, name, 1, Devices.whole(1), 0, 0, 0, 0)


NODES = {
    each.id: each
    for each in (node("ab12" + 52 * "0", "gpu-1"), node("ab34" + 52 * "0", "gpu-2"), node("cd" * 28, "gpu-2"))
}


@pytest.mark.parametrize(("word", "index"), [("gpu-1", 0), ("ab12", 0), ("ab34" + 52 * "0", 1), ("c", 2)])
def test_a_name_an_id_and_its_beginning(word: str, index: int) -> None:
    assert named([word], NODES) == [list(NODES.values())[index]]


def test_each_node_once() -> None:
    assert [each.id[:4] for each in named(["ab12", "cd", "gpu-1"], NODES)] == ["ab12", "cdcd"]


def test_a_name_comes_before_the_beginning_of_an_id() -> None:
    nodes = {"abcd": node("abcd", "x"), "ef": node("ef", "ab")}
    assert named(["ab"], nodes) == [nodes["ef"]]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gpu-2", r"'gpu-2' could be any of gpu-2 \(ab340000\), gpu-2 \(cdcdcdcd\): give more of its id"),
        ("ab", r"'ab' could be any of gpu-1 \(ab120000\), gpu-2 \(ab340000\)"),
        ("gpu-3", r"there is no node 'gpu-3'; there are gpu-1 \(ab120000\), gpu-2 \(ab340000\), gpu-2 \("),
        ("", r"there is no node ''"),
    ],
)
def test_what_names_none_or_several_is_told_what_there_is(word: str, message: str) -> None:
    with pytest.raises(UnknownNode, match=message):
        named(["gpu-1", word], NODES)


def test_a_large_cluster_is_not_listed_whole() -> None:
    many = {f"{n:056x}": node(f"{n:056x}", f"n{n:03}") for n in range(100)}
    with pytest.raises(UnknownNode, match=r"n019 \(00000000\) and 80 more$"):
        named(["x"], many)
    with pytest.raises(UnknownNode, match="there are none"):
        named(["x"], {})


def test_a_node_that_is_gone_is_meant_where_no_other_is() -> None:
    gone = {each.id: each for each in (node("ef" * 28, "gpu-1"), node("09" * 28, "gpu-9"))}
    assert [each.id[:2] for each in named(["gpu-1", "gpu-9", "ef"], NODES, gone)] == ["ab", "09", "ef"]
    with pytest.raises(UnknownNode, match="there is no node 'gpu-9'"):
        named(["gpu-9"], NODES)
