"""Releases that have to wait until nothing of an old Ray can still be running."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rm.core.effects import Effect, Release, Stop
from rm.core.events import NodeJoined
from rm.core.model import Gang, PlacedBundle
from rm.core.resources import GPU_UNIT, Bundle
from rm.runtime import old_world
from rm.runtime.nodes import Seen
from rm.runtime.old_world import LIMIT, MARGIN_S, OldWorld, limit_s
from rm.runtime.orders import process_mark

KEY = "abcdef"
NAMES = {"here": "head", "old-here": "head", "old-there": "gpu-7"}


def release(*node_ids: str) -> Release:
    placed = tuple(PlacedBundle(each, (0,)) for each in node_ids)
    return Release("j1", 1, Gang(Bundle(GPU_UNIT), len(placed)), placed)


class World:
    """This Ray has the nodes "here", alive, and "dead"; its head has run for `age_s`. Nothing really sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, age_s: float) -> None:
        self.done: list[Effect] = []
        self.slept: list[float] = []
        self.asked = 0
        monkeypatch.setattr(old_world, "node_table", self.node_table)
        monkeypatch.setattr(old_world, "parent_age_s", lambda: age_s)
        monkeypatch.setattr(old_world, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": self.sleep}))

    def node_table(self) -> tuple[str, set[str]]:
        self.asked += 1
        return "head", {"here", "dead"}

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def play(self, *batches: Iterable[Effect]) -> None:
        async def main() -> None:
            watch: Any = SimpleNamespace(seen=Seen(1.0, {"here": None}, frozenset({"silent"})))  # type: ignore[dict-item]
            recorded = {each: NodeJoined(0, each, name, 1, 0, 0) for each, name in NAMES.items()}
            gate = OldWorld(KEY, self.done.extend, watch, lambda: recorded)
            for batch in batches:
                gate.execute(batch)
                recorded.clear()  # as they are lost
            while gate._held:
                await asyncio.gather(*gate._held.values())

        asyncio.run(main())


def test_what_this_ray_knows_is_passed_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 0.0)
    effects = [Stop("j1", 1, 3.0), release("here", "silent")]
    world.play(effects)
    assert (world.done, world.asked) == (effects, 0)


def test_a_node_that_died_in_this_ray_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 0.0)
    world.play([release("here", "dead")])
    assert (world.done, world.slept) == ([release("here", "dead")], [])


@pytest.mark.parametrize(("age_s", "left"), [(1.0, [64.0]), (64.0, [1.0]), (65.0, []), (9999.0, [])])
def test_another_machine_is_given_its_minute_from_the_start_of_the_head(
    monkeypatch: pytest.MonkeyPatch, age_s: float, left: list[float]
) -> None:
    monkeypatch.delenv(LIMIT, raising=False)
    world = World(monkeypatch, age_s)
    world.play([], [release("old-here", "old-there")])
    assert world.slept == pytest.approx(left)
    assert world.done == [release("old-here", "old-there")]


def test_a_node_of_no_known_name_may_be_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 0.0)
    world.play([release("unknown")])
    assert world.slept == [limit_s() + MARGIN_S]


def test_a_release_that_is_asked_for_again_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 0.0)
    world.play([release("old-there")], [release("old-there"), Stop("j2", 1, 0.0)])
    assert world.done == [Stop("j2", 1, 0.0), release("old-there")], "and the others do not wait for it"


def test_processes_that_are_left_here_are_ended_first(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {**os.environ, "RM_ATTEMPT_KEY": process_mark(KEY, "j1.1", 1)}
    left = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(1000)"], env=env,
                            stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert left.stdout is not None
        left.stdout.readline()
        world = World(monkeypatch, 0.0)
        world.play([release("here", "old-here")])
        assert left.wait(120) == -9
        assert (world.done, world.slept) == ([release("here", "old-here")], [])
    finally:
        left.kill()
        left.wait()
        left.stdout.close()


def test_rays_limit_is_read_where_ray_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "7")
    assert limit_s() == 7
    monkeypatch.setenv(LIMIT, "soon")
    assert limit_s() == 60


def test_the_parents_age_is_that_of_its_process() -> None:
    code = "from rm.runtime.old_world import parent_age_s; print(parent_age_s())"
    ages = [time.time() - psutil.Process().create_time()]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    ages.append(time.time() - psutil.Process().create_time())
    assert ages[0] - 2 < float(said) < ages[1] + 2, "the boot time is in whole seconds"
