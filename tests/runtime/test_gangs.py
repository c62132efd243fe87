"""What a run of a gang tells of itself, with runners that are not there all the time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from rm.core.effects import Run
from rm.core.events import RunStarted
from rm.core.model import Gang, Kind, PlacedBundle
from rm.core.resources import GPU_UNIT, Bundle
from rm.runtime import gangs as module
from rm.runtime.gangs import _GangRun, _Stopping
from rm.runtime.orders import Seat


class FakeRunner:
    """The first `away` calls of `started` fail."""

    def __init__(self, away: int) -> None:
        self.away = away
        self.asked = 0
        self.started = SimpleNamespace(remote=self._started)

    async def _started(self, _key: str) -> list[int]:
        self.asked += 1
        if self.asked <= self.away:
            raise RayError("the actor is temporarily unavailable")
        return [1]


def test_a_start_is_told_by_a_runner_that_could_not_be_reached_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BRIEF_S", 0)
    monkeypatch.setattr(module, "STARTED_AGAIN_S", 0)
    posted: list[Any] = []
    nobody: Any = SimpleNamespace(
        _clock=lambda: 5.0, _post=posted.append, _watch=SimpleNamespace(seen=SimpleNamespace(nodes={}))
    )
    gang = Gang(Bundle(GPU_UNIT), 2)
    effect = Run(
        "j1", 1, Kind.COMMAND, gang, (PlacedBundle("a", (0,)), PlacedBundle("b", (0,))), 1.0, begun=False
    )
    run = _GangRun(nobody, effect, _Stopping(), ordered=False)
    run._handles = [FakeRunner(0), FakeRunner(2)]
    seats = [Seat(node, f"{node}.example", 1, ("0",), "3.11") for node in "ab"]
    asyncio.run(run._tell_started(["k0", "k1"], seats))
    assert posted == [RunStarted(5.0, "j1", 1, ("a.example", "b.example"), (("0",), ("0",)))]
    assert run._handles[1].asked == 3
