"""Placement groups of a real Ray: what is waited for, and how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from probes import wait_until

from rm.core.model import Gang, PlacedBundle
from rm.core.resources import Bundle, gpu_units
from rm.runtime.placements import Placements

pytestmark = pytest.mark.ray
NODE = Gang(Bundle(gpu_units(8)), 1)


@pytest.fixture
def placements(client) -> Iterator[Placements]:
    placements = Placements("tests")
    yield placements
    for attempt in placements.attempts():
        asyncio.run(placements.remove(attempt))
    wait_until(lambda: sum(node.free_gpus for node in client.nodes()) == 24, 20, "all is free again")


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
