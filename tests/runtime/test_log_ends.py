"""Ends of logs on their way: several in one call, none held up for long, none lost for a store that is away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayError

from rm.runtime import log_ends
from rm.runtime.log_ends import LogEnds
from rm.store import LogEnd


class FakeStore:
    """Takes calls down; the first `away` of them fail with `error`."""

    error: Exception = RayError("the store is away")

    def __init__(self, away: int = 0, *, full: bool = False) -> None:
        """`full`: what is of j0 can't be written."""
        self.calls: list[list[LogEnd]] = []
        self.away = away
        self.full = full

    async def call(self, method: str, ends: list[LogEnd]) -> dict[int, str]:
        assert method == "end_all_logs"
        await asyncio.sleep(0)
        if self.away:
            self.away -= 1
            raise self.error
        self.calls.append(ends)
        return {place: "disk full" for place, each in enumerate(ends) if self.full and each == end(0)}


@pytest.fixture(autouse=True)
def no_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not hurried along would wait for longer than any test."""
    monkeypatch.setattr(log_ends, "LINGER_S", 3_600)
    monkeypatch.setattr(log_ends, "AGAIN_S", 0)


def end(number: int) -> LogEnd:
    return f"kabc-j{number}", 1, [(0, "out", 0, b"x")]


def made(store: FakeStore) -> LogEnds:
    link: Any = store
    return LogEnds(link)


async def sent(store: FakeStore, *, at_once: bool = True) -> None:
    await made(store).send(end(0), at_once=at_once)


def test_ends_wait_for_each_other_and_travel_together() -> None:
    async def play() -> list[list[LogEnd]]:
        store = FakeStore()
        ends = made(store)
        waiting = [ends.send(end(number), at_once=False) for number in range(3)]
        _, pending = await asyncio.wait(waiting, timeout=0.05)
        assert len(pending) == 3 and not store.calls
        ends.hurry()
        await asyncio.gather(*waiting)
        return store.calls

    assert asyncio.run(play()) == [[end(0), end(1), end(2)]]


def test_one_that_is_awaited_takes_the_others_along() -> None:
    async def play() -> list[list[LogEnd]]:
        store = FakeStore()
        ends = made(store)
        first = ends.send(end(0), at_once=False)
        await asyncio.sleep(0)
        await ends.send(end(1), at_once=True)
        await first
        await ends.send(end(2), at_once=True)
        return store.calls

    assert asyncio.run(play()) == [[end(0), end(1)], [end(2)]]


def test_nobody_waits_for_longer_than_the_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_ends, "LINGER_S", 0.01)
    store = FakeStore()
    asyncio.run(sent(store, at_once=False))
    assert store.calls == [[end(0)]]


def test_a_hurry_of_before_is_not_remembered() -> None:
    async def play() -> None:
        store = FakeStore()
        ends = made(store)
        ends.hurry()
        waiting = ends.send(end(0), at_once=False)
        await asyncio.wait([waiting], timeout=0.05)
        assert not store.calls
        ends.hurry()
        await waiting

    asyncio.run(play())


def test_a_store_that_is_away_is_asked_again() -> None:
    store = FakeStore(away=3)
    asyncio.run(sent(store))
    assert store.calls == [[end(0)]]


def test_a_store_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_ends, "GIVE_UP_S", -1)
    store = FakeStore(away=10)
    asyncio.run(sent(store))
    assert store.calls == [] and store.away == 9


def test_what_comes_while_others_can_not_be_sent_goes_with_them() -> None:
    async def play() -> list[list[LogEnd]]:
        store = FakeStore(away=50)
        ends = made(store)
        first = ends.send(end(0), at_once=True)
        while store.away > 40:
            await asyncio.sleep(0)
        second = ends.send(end(1), at_once=True)
        await asyncio.gather(first, second)
        return store.calls

    assert asyncio.run(play()) == [[end(0), end(1)]]


def test_what_the_store_does_not_take_is_handed_in() -> None:
    async def play() -> None:
        store = FakeStore(away=10**9)
        ends = made(store)
        under_way = ends.send(end(0), at_once=True)
        await asyncio.sleep(0.01)
        waiting = ends.send(end(1), at_once=False)
        assert await ends.hand_in(0.02) == [end(0), end(1)]
        await asyncio.wait_for(asyncio.gather(under_way, waiting), 1)
        assert await ends.hand_in(0.02) == [], "once"
        store.away = 0
        await ends.send(end(2), at_once=True)

    asyncio.run(play())


def test_what_it_takes_is_not_handed_in() -> None:
    async def play() -> None:
        store = FakeStore(away=3)
        ends = made(store)
        ends.send(end(0), at_once=False)
        assert await ends.hand_in(5) == []
        assert store.calls == [[end(0)]]
        ends.send(end(1), at_once=False)
        await ends.delivered(5)
        assert store.calls[1:] == [[end(1)]]
        await ends.delivered(5)

    asyncio.run(play())


def test_an_error_that_nobody_thought_of_leaves_nobody_waiting() -> None:
    store = FakeStore(away=1)
    store.error = KeyError("odd")
    asyncio.run(asyncio.wait_for(sent(store), 5))
    assert store.calls == []


def test_a_store_of_before_is_asked_in_its_own_words() -> None:
    asked = []

    class Old:
        async def call(self, method: str, *arguments: Any) -> None:
            if method == "end_all_logs":
                raise AttributeError(method)
            asked.append((method, *arguments))

    old: Any = Old()
    asyncio.run(asyncio.wait_for(sent(old), 5))
    assert asked == [("end_logs", *end(0))]


def test_one_that_can_not_be_written_holds_up_no_other() -> None:
    async def play() -> None:
        store = FakeStore(full=True)
        ends = made(store)
        bad = ends.send(end(0), at_once=False)
        await asyncio.wait_for(ends.send(end(1), at_once=True), 5)
        await asyncio.wait_for(ends.send(end(2), at_once=False), 5)
        assert not bad.done()
        await asyncio.wait_for(ends.delivered(5, job="kabc-j3"), 1)
        store.full = False
        await asyncio.wait_for(ends.delivered(5, job="kabc-j0"), 1)
        assert bad.done()

    asyncio.run(play())


def test_it_is_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(log_ends, "GIVE_UP_S", 0.02)
    asyncio.run(asyncio.wait_for(sent(FakeStore(full=True)), 5))
    assert "the end of the log of kabc-j0 is lost, the store does not take it: disk full" in caplog.text
