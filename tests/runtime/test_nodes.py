"""What is concluded from readings of Ray's nodes: of those that have not been heard, nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from rm.core.events import Event, NodeJoined, NodeLost
from rm.runtime import nodes
from rm.runtime.nodes import NodeWatch, Seen, SeenNode

GROUP = "ab" * 18


def node(name: str, *groups: str) -> SeenNode:
    return SeenNode(name, name, 40_000, 0, 0, 40_000, 0, 0, (), dict.fromkeys(groups, (10000, 0, 0)))


def reading(*seen: SeenNode, unheard: Iterable[str] = ()) -> Seen:
    return Seen(1.0, {each.id: each for each in seen}, frozenset(unheard))


def test_a_node_that_is_not_heard_lacks_nothing_and_is_not_gone() -> None:
    seen = reading(node("a", GROUP), node("b"), node("c"), unheard=["c", "d"])
    assert {each: seen.lacks(GROUP, each) for each in "abcde"} == {
        "a": False,
        "b": True,
        "c": False,
        "d": False,
        "e": True,
    }
    assert [each for each in "abcde" if seen.gone(each)] == ["e"]
    assert not Seen().gone("a"), "nothing has been read yet"


def events_of(
    monkeypatch: pytest.MonkeyPatch, expected: Iterable[str], *readings: Seen | Exception
) -> list[str]:
    """What a watch posts at its start, when these are what it reads: "+a" joined, "-a" lost."""
    told: list[Event] = []
    left = list(readings)

    def read(_: Seen) -> Seen:
        now = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(now, Exception):
            raise now
        return now

    monkeypatch.setattr(nodes, "read_nodes", read)
    monkeypatch.setattr(nodes, "HEARD_S", 0.3)

    async def main() -> None:
        watch = NodeWatch(told.append, lambda _: True, clock=lambda: 0.0, poll_s=0.01)
        await watch.first(expected)
        while len(left) > 1:
            await watch.observe()
        await watch.observe()

    asyncio.run(main())
    signs = {NodeJoined: "+", NodeLost: "-"}
    return [signs[type(each)] + each.node_id for each in told if isinstance(each, NodeJoined | NodeLost)]


def test_a_start_waits_for_those_that_are_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (reading(node("a"), unheard=["b"]), reading(node("a"), node("b")))
    assert events_of(monkeypatch, ["a", "b"], *table) == ["+a", "+b"]


def test_a_start_tells_of_those_that_went(monkeypatch: pytest.MonkeyPatch) -> None:
    assert events_of(monkeypatch, ["a", "b"], reading(node("a"))) == ["-b", "+a"]


def test_one_that_is_listed_and_silent_is_lost_when_it_is_listed_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent = reading(node("a"), unheard=["b"])
    assert events_of(monkeypatch, ["b"], silent) == ["+a"]
    table = (silent, reading(node("a"), node("c")), reading(node("a"), node("c")))
    assert events_of(monkeypatch, ["b"], *table) == ["+a", "-b", "+c"]


def test_a_reading_that_fails_tells_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (RuntimeError("Ray lists 0 live nodes"), reading(node("a")))
    assert events_of(monkeypatch, ["a"], *table) == ["+a"]
