"""When a placement group is removed, and who is told. The GCS is played; `test_placements` has a real one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from rm.runtime import group_removal
from rm.runtime.group_removal import all_of, remove_group


class Gcs:
    """What it says of a group, one after the other; the last for good."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *says: tuple[str, str]) -> None:
        self.says = list(says)
        self.log: list[Any] = []
        monkeypatch.setattr(group_removal, "placement_group_table", self.table)
        monkeypatch.setattr(group_removal, "remove_placement_group", lambda _: self.log.append("removed"))
        monkeypatch.setattr(group_removal, "take_back", lambda _, bundles: self.log.append(list(bundles)))
        monkeypatch.setattr(group_removal, "FLIGHT_S", 0.0)

    def table(self, _: Any) -> dict[str, Any]:
        state, scheduling = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        self.log.append(state)
        entry = {"state": state, "stats": {"scheduling_state": scheduling}, "bundles": {0: {}, 1: {}}}
        return entry if state else {}


GROUP: Any = SimpleNamespace(id=SimpleNamespace(binary=lambda: b"id"))
QUEUED, PREPARED = ("PENDING", "QUEUED"), ("PREPARED", "QUEUED")
CREATED, REMOVED = ("CREATED", "FINISHED"), ("REMOVED", "REMOVED")


def test_what_is_being_made_is_removed_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    gcs = Gcs(monkeypatch, QUEUED, PREPARED, PREPARED, CREATED)
    asyncio.run(remove_group(GROUP))
    assert gcs.log == ["PENDING", "PREPARED", "PREPARED", "CREATED", "removed"]


def test_what_was_seen_made_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    gcs = Gcs(monkeypatch, QUEUED)
    asyncio.run(remove_group(GROUP, committed=True))
    assert gcs.log == ["removed"]


@pytest.mark.parametrize("why", ["NO_RESOURCES", "INFEASIBLE"])
def test_what_waits_is_removed_at_once_and_the_nodes_are_told(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    gcs = Gcs(monkeypatch, ("PENDING", why))
    asyncio.run(remove_group(GROUP))
    assert gcs.log == ["PENDING", "removed", [0, 1]]


def test_what_is_on_its_way_for_ever_is_removed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_removal, "SETTLES_S", 0.05)
    gcs = Gcs(monkeypatch, QUEUED)
    asyncio.run(remove_group(GROUP))
    assert gcs.log[-2:] == ["removed", [0, 1]]


def test_again_after_a_removal_that_came_no_further_the_nodes_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gcs = Gcs(monkeypatch, REMOVED)
    asyncio.run(remove_group(GROUP))
    assert gcs.log == ["REMOVED", "removed", [0, 1]]
    gcs.says = [("", "")]
    asyncio.run(remove_group(GROUP))
    assert gcs.log[3:] == ["", "removed"], "nobody knows it any more"


def test_one_that_fails_is_no_reason_to_give_up_the_others() -> None:
    done: list[int] = []

    async def one(number: int) -> None:
        await asyncio.sleep(0.01 * number)
        if number == 0:
            raise ConnectionError("the GCS is away")
        done.append(number)

    with pytest.raises(ConnectionError):
        asyncio.run(all_of(map(one, range(3))))
    assert done == [1, 2]
