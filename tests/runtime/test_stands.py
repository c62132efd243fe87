"""Stands that are handed on before that is committed: what is kept and what goes when the commit never was.

Ray's groups and actors are played; on Ray, `tests/integration/test_stands_on_ray.py` hands stands on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup
from test_writer import until

from rm.core.model import Gang, PlacedBundle
from rm.core.resources import GPU_UNIT, Bundle
from rm.runtime.placements import Placements
from rm.runtime.stands import Stands

GANG = Gang(Bundle(GPU_UNIT, 0, 0))
PLACED = (PlacedBundle("n1", (0,)),)


class PlayedPlacements(Placements):
    """Groups that are there once they are made, and gone once they are removed."""

    def __init__(self) -> None:
        super().__init__("k")
        self.removed: list[str] = []

    def make(self, attempt: str) -> None:
        self._remember(attempt, PlacementGroup(PlacementGroupID.from_random()))

    async def remove(self, attempt: str) -> str | None:
        if (group_id := self.group_id(attempt)) is not None:
            self.removed.append(self.name(attempt))
        return group_id


class World:
    """Stands, and the hand that holds back the taking down of one."""

    def __init__(self) -> None:
        self.placements = PlayedPlacements()
        self.seen_gone = asyncio.Event()
        self.killed: list[str] = []
        self.sent: list[Any] = []
        self.stands = Stands(self.placements, self, self, self, keep_s=60)  # type: ignore[arg-type]

    async def kill(self, attempt: str, count: int) -> None:
        self.killed.append(attempt)

    def send(self, end: Any, *, at_once: bool) -> None:
        assert at_once
        self.sent.append(end)

    async def until(self, *_: object) -> bool:
        await self.seen_gone.wait()
        return True

    def end(self, attempt: str, *left: Any) -> bool:
        """The attempt has ended on a stand that was made for it, and the stand is to be kept.

        `left`: what its runner can't get rid of.
        """
        if self.placements.handle(attempt) is None:
            self.placements.make(attempt)
        runner = SimpleNamespace(
            life=SimpleNamespace(remote=asyncio.get_running_loop().create_future),
            hand_in=SimpleNamespace(remote=lambda: asyncio.sleep(0, list(left))),
        )
        return self.stands.keep(attempt, GANG, PLACED, {}, [runner], [])


def played(body: Callable[[World], Awaitable[None]]) -> None:
    async def play() -> None:
        await body(World())

    asyncio.run(play())


def test_a_stand_is_nobodys_until_its_taking_is_committed() -> None:
    async def body(world: World) -> None:
        assert world.end("j1.1")
        assert world.stands.promise("j2.1", GANG, PLACED, {})
        assert world.stands.unused() == {"j1.1"}
        world.stands.kept("j2.1")
        assert world.stands.unused() == frozenset()
        assert world.stands.taken("j2.1") is not None

    played(body)


def test_a_promise_that_was_committed_after_all_is_the_attempts_own() -> None:
    async def body(world: World) -> None:
        world.end("j1.1")
        world.stands.promise("j2.1", GANG, PLACED, {})
        world.stands.keep_promises({"j2.1"})
        assert world.stands.unused() == frozenset()
        world.seen_gone.set()
        await world.stands.take_down("j2.1", {"n1"}, 1)
        assert world.placements.removed == world.killed == ["j1.1"]
        assert world.stands.held() == {}, "and nothing is left of it"

    played(body)


def test_a_stand_that_was_promised_to_nobody_goes_and_leaves_the_name_free() -> None:
    async def body(world: World) -> None:
        world.end("j1.1")
        world.stands.promise("j2.1", GANG, PLACED, {})
        world.stands.keep_promises(())
        world.placements.make("j2.1")  # the same job is admitted again, and its attempt has the same number
        await until(lambda: world.placements.removed)
        assert world.stands.held() == {"n1": {"j1.1": GPU_UNIT}}, "until it is seen gone"
        assert not world.end("j1.1"), "who had it before ends once more: it isn't kept a second time"
        world.seen_gone.set()
        await world.stands.all_gone()
        assert world.placements.removed == ["j1.1"]
        assert world.placements.attempts() == {"j2.1"}
        assert world.stands.held() == {}

    played(body)


@pytest.mark.parametrize("hands", [1, 2, 3])
def test_a_stand_keeps_its_name_through_many_hands(hands: int) -> None:
    async def body(world: World) -> None:
        world.end("j1.1")
        for number in range(2, 2 + hands):
            attempt = f"j{number}.1"
            assert world.stands.take(attempt, GANG, PLACED, {})
            assert world.placements.name(attempt) == "j1.1"
            assert world.end(attempt)
        assert world.stands.promise("j9.1", GANG, PLACED, {})
        world.stands.keep_promises(())
        assert world.stands.unused() == {"j1.1"}
        world.seen_gone.set()
        await world.stands.all_gone()
        assert world.placements.removed == world.killed == ["j1.1"]

    played(body)


def test_what_the_runners_of_a_stand_could_not_send_is_sent_when_they_are_ended() -> None:
    """Whoever had the stand last need not have run at all."""

    async def body(world: World) -> None:
        world.end("j1.1", ("kabc-j1", 1, []))
        assert world.stands.take("j2.1", GANG, PLACED, {})
        world.seen_gone.set()
        await world.stands.take_down("j2.1", {"n1"}, 1)
        await until(lambda: world.sent == [("kabc-j1", 1, [])])

    played(body)


def test_a_stand_that_nobody_takes_hands_in_as_well() -> None:
    async def body(world: World) -> None:
        world.end("j1.1", ("kabc-j1", 1, []))
        world.seen_gone.set()
        world.stands.retire_all()
        await world.stands.all_gone()
        await until(lambda: world.sent == [("kabc-j1", 1, [])])

    played(body)


def test_runners_that_can_not_be_asked_are_ended_all_the_same() -> None:
    """Of another version, or dead."""

    async def body(world: World) -> None:
        world.placements.make("j1.1")
        world.seen_gone.set()
        dead = SimpleNamespace(hand_in=SimpleNamespace(remote=lambda: asyncio.wait_for(asyncio.sleep(1), 0)))
        await world.stands.take_down("j1.1", {"n1"}, 1, [dead])
        world.placements.make("j2.1")
        await world.stands.take_down("j2.1", {"n1"}, 1, [SimpleNamespace()])
        assert world.killed == ["j1.1", "j2.1"]

    played(body)
