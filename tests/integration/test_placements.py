"""Placement groups of a real Ray: what is waited for, and how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from probes import wait_until
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rm.core.model import Gang, PlacedBundle
from rm.core.resources import Bundle, gpu_units
from rm.runtime.group_removal import take_back
from rm.runtime.placements import Placements

pytestmark = pytest.mark.ray
NODE = Gang(Bundle(gpu_units(8)), 1)
ONE = Gang(Bundle(gpu_units(1)), 1)


@pytest.fixture
def placements(client) -> Iterator[Placements]:
    placements = Placements("tests")
    yield placements
    for attempt in placements.attempts():
        asyncio.run(placements.remove(attempt))
    wait_until(lambda: free(client) == 24, 20, "all is free again")


def free(client) -> float:
    return sum(node.free_gpus for node in client.nodes())


def place(client) -> tuple[PlacedBundle, ...]:
    return (PlacedBundle(client.nodes()[0].id, tuple(range(8))),)


def test_a_group_whose_making_is_given_up_is_known(client, placements: Placements) -> None:
    """A job that is cancelled just then releases it, or its GPUs are lost to everybody."""
    where = place(client)

    async def given_up() -> None:
        making = asyncio.create_task(placements.create("given-up", NODE, where))
        await asyncio.sleep(0)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making

    asyncio.run(given_up())
    assert placements.group_id("given-up") is not None


def test_a_group_is_waited_for_as_long_as_asked(client, placements: Placements) -> None:
    """GPUs that were free a moment ago may take Ray a while; nobody gives up before the time is over."""
    where = place(client)

    async def meanwhile() -> tuple[bool, float, bool, float]:
        await placements.create("before", NODE, where)
        assert await placements.ready("before", 20)
        await placements.create("after", NODE, where)
        began = time.monotonic()
        early = await placements.ready("after", 0.8)
        waited = time.monotonic() - began
        late = asyncio.create_task(placements.ready("after", 20))
        await asyncio.sleep(1.2)
        assert not late.done()
        await placements.remove("before")
        return early, waited, await late, time.monotonic() - began

    early, waited, late, all_in_all = asyncio.run(meanwhile())
    assert not early
    assert waited >= 0.8
    assert late
    assert all_in_all < 20


def test_groups_that_are_removed_while_they_are_made_give_everything_back(client) -> None:
    """Removed by Ray's own call just then, about one of 15 is forgotten by the GCS and held by its node for ever."""
    placements, where = Placements("tests"), place(client)[0].node_id

    async def one(attempt: str) -> None:
        await placements.create(attempt, ONE, (PlacedBundle(where, (0,)),))
        await placements.remove(attempt)
        placements.forget(attempt)

    async def one_after_the_other() -> None:
        for attempt in range(150):
            await one(f"{attempt}")

    asyncio.run(one_after_the_other())
    time.sleep(1)  # of what is held for ever nothing shows yet, either
    wait_until(lambda: free(client) == 24, 20, "all is free again")


def test_a_node_gives_back_what_the_gcs_has_forgotten(client) -> None:
    where = {"ray.io/node-id": place(client)[0].node_id}
    made: list[PlacementGroup] = []

    def lost() -> bool:
        """Whether Ray has lost GPUs by now. A look takes long enough for those that are on their way back."""
        for _ in range(40):
            made.append(placement_group([{"GPU": 0.01}], lifetime="detached", bundle_label_selector=[where]))
            remove_placement_group(made[-1])
            time.sleep(0.005)
        time.sleep(1)
        return free(client) < 24

    try:
        if not any(lost() for _ in range(20)):
            pytest.fail("Ray no longer loses any of 800: rm.runtime.group_removal has no reason to be left")
    finally:
        for group in made:
            take_back(group.id.binary(), [0])
    wait_until(lambda: free(client) == 24, 20, "all is free again")
