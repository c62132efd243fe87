"""Groups that keep idle nodes: one for each node that is to stay, and none for any other.

Ray is played; on a real one, `tests/integration/test_autoscaling.py` has a node stay and go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from test_writer import until

from rm.runtime import stays
from rm.runtime.nodes import Seen, SeenNode
from rm.runtime.stays import Stays


class World:
    """Nodes a and b, and the groups that Ray has: by id, the node of each."""

    def __init__(self) -> None:
        self.groups: dict[str, str] = {}
        self.made: list[tuple[str, list[dict[str, float]], Any]] = []
        self.broken = False
        self.names = ["a", "b"]
        self.stays = Stays("k", seen=self.seen)
        self._count = 0

    def seen(self, later_s: float = 0.0) -> Seen:
        nodes = {}
        for name in self.names:
            held = {group_id: (0, 0, 0) for group_id, node_id in self.groups.items() if node_id == name}
            nodes[name] = SeenNode(name, name, 0, 0, 0, 0, 0, 0, (), held, f"node:{name}")
        return Seen(time.monotonic() + later_s, nodes)

    def make(
        self, bundles: list[dict[str, float]], *, name: str, bundle_label_selector: Any, **more: Any
    ) -> Any:
        assert not more, "not detached: it goes with the allocator"
        if self.broken:
            raise ConnectionError("the GCS is away")
        self._count += 1
        group_id = f"{self._count:036x}"
        self.groups[group_id] = bundle_label_selector[0]["ray.io/node-id"]
        self.made.append((name, bundles, bundle_label_selector))
        return SimpleNamespace(id=SimpleNamespace(hex=lambda: group_id))

    async def remove(self, handle: Any) -> None:
        self.groups.pop(handle.id.hex(), None)

    def on(self) -> list[str]:
        return sorted(self.groups.values())


def play(monkeypatch: pytest.MonkeyPatch, scene: Callable[[World], Awaitable[None]]) -> None:
    world = World()
    monkeypatch.setattr(stays, "placement_group", world.make)
    monkeypatch.setattr(stays, "remove_group", world.remove)

    async def main() -> None:
        task = asyncio.create_task(world.stays.run())
        try:
            await scene(world)
        finally:
            task.cancel()

    asyncio.run(main())


def test_a_node_stays_as_long_as_it_is_wanted_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        world.stays.want(("a",))
        await until(lambda: world.on() == ["a"])
        assert world.stays.groups() == set(world.groups)
        name, bundles, selectors = world.made[0]
        assert name.startswith("rm/k/stay/")
        assert bundles == [{"node:a": 0.001}], "neither GPUs nor CPUs: it stands in nobody's way"
        assert selectors == [{"ray.io/node-id": "a"}]
        world.stays.want(("a", "b"))
        await until(lambda: world.on() == ["a", "b"])
        leaving = {group_id for group_id, node_id in world.groups.items() if node_id == "a"}
        world.stays.want(("b",))
        await until(lambda: world.on() == ["b"])
        assert leaving < world.stays.groups(), "it may still be seen for a moment"
        assert len(world.made) == 2

    play(monkeypatch, scene)


def test_what_somebody_removed_is_made_again_and_what_fails_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stays, "LOOK_S", 0.05)

    async def scene(world: World) -> None:
        world.broken = True
        world.stays.want(("a",))
        await asyncio.sleep(0.1)
        assert not world.groups
        world.broken = False
        await until(lambda: world.on() == ["a"])
        world.groups.clear()
        await until(lambda: world.on() == ["a"])
        await until(lambda: len(world.stays.groups()) == 1)

    play(monkeypatch, scene)


def test_a_node_that_is_not_seen_yet_gets_its_stay_when_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stays, "LOOK_S", 0.05)

    async def scene(world: World) -> None:
        world.names = ["b"]
        world.stays.want(("a",))
        await asyncio.sleep(0.1)
        assert not world.made
        world.names = ["a", "b"]
        await until(lambda: world.on() == ["a"])

    play(monkeypatch, scene)


def test_a_reading_that_is_older_than_the_stay_says_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        old = replace(world.seen(), at=time.monotonic() - 60)
        world.stays.want(("a",))
        await until(lambda: world.on() == ["a"])
        world.stays._seen = lambda: old
        await world.stays.reconcile()
        assert len(world.made) == 1

    play(monkeypatch, scene)


def test_once_closed_every_node_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        world.stays.want(("a", "b"))
        await until(lambda: world.on() == ["a", "b"])
        await world.stays.close()
        assert not world.groups
        world.stays.want(("a",))
        await world.stays.reconcile()
        assert not world.groups

    play(monkeypatch, scene)
