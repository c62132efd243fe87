"""Logs on their way from a node to the store on the head.

User code writes to plain files on its node, so it never waits for the network; this follows the files and sends
what is new in bounded batches, one at a time per file, each acknowledged before the next. The store writes by
offset: a batch sent again after a lost answer changes nothing.

What was acknowledged takes no space on the node any more, but for the last lines, which explain a failure. A rank that
prints faster than the store takes it in for long loses what is oldest of its backlog, and the log says so: neither the
rank nor the node's disk waits for the network.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from ray.exceptions import RayError

from rm.runtime.links import Link
from rm.runtime.orders import RunOrder
from rm.runtime.processes import RankProcess
from rm.runtime.tail import Tail
from rm.store import LogEnd

log = logging.getLogger("rm.logs")

BATCH_BYTES = 1 << 20
LOOK_S = 0.1
"""How often quiet files are looked at."""
BEHIND_MOST_BYTES = 256 * 2**20
"""Of one file that wait to be sent; beyond it the older half is given up."""
KEPT_BYTES = 256 * 1024
"""Of what was sent, so much stays readable on the node."""
FORGET_BYTES = 4 * 2**20
"""Space is given back in pieces of this size."""
SHORT_BYTES = 4 * 1024
"""So little of all a bundle's logs together need not be sent at once."""
GIVE_UP_S = 60.0
"""How long an unreachable store may hold up the end of a run; then the rest of the log is lost, and said to be."""


class LogShipper:
    """Every rank's stdout and stderr of one bundle."""

    def __init__(self, store: Link, order: RunOrder, processes: Sequence[RankProcess]) -> None:
        self._store = store
        self._order = order
        self._tails = [
            (each.rank, stream, Tail(path))
            for each in processes
            for stream, path in (("out", each.stdout), ("err", each.stderr))
        ]
        self._sent: dict[tuple[int, str], int] = {}
        self._unsent: dict[tuple[int, str], bytes] = {}

    async def run(self) -> None:
        """Follow the files until cancelled. There is nothing in them yet."""
        await asyncio.sleep(LOOK_S)
        while True:
            try:
                moved = await self._pass()
            except (RayError, ValueError):
                log.warning("the log store can't be reached; trying again")
                moved = False
                await asyncio.sleep(1)
            if not moved:
                await asyncio.sleep(LOOK_S)

    async def finish(self) -> LogEnd | None:
        """Send what is left and close the logs. Called once, after `run` was cancelled and all ranks are gone.

        Where little is left it is not sent but returned: then the rank's files are not needed any more.
        """
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            try:
                while any(self._unsent.values()) or self._behind() > BATCH_BYTES:
                    await self._pass()
                last = [(rank, stream, *self._next(rank, stream, tail)) for rank, stream, tail in self._tails]
                end = self._order.archive_id, self._order.attempt, last
                if sum(len(data) for *_, data in last) <= SHORT_BYTES:
                    return end
                await self._store.call("end_logs", *end)
                return None
            except (RayError, ValueError):
                if time.monotonic() > deadline:
                    log.exception("the log store can't be reached; the end of the log is lost")
                    return None
                await asyncio.sleep(1)

    def _behind(self) -> int:
        return sum(tail.behind() for _, _, tail in self._tails)

    async def _pass(self) -> bool:
        """One batch of every file that has news. True where there was any."""
        moved = await asyncio.gather(*(self._ship(*each) for each in self._tails))
        return any(moved)

    async def _ship(self, rank: int, stream: str, tail: Tail) -> bool:
        offset, data = self._next(rank, stream, tail)
        if not data:
            return False
        order = self._order
        await self._store.call("append_log", order.archive_id, order.attempt, rank, stream, offset, data)
        del self._unsent[rank, stream]
        self._sent[rank, stream] = offset + len(data)
        tail.forget(KEPT_BYTES, FORGET_BYTES)
        return True

    def _next(self, rank: int, stream: str, tail: Tail) -> tuple[int, bytes]:
        """The file's next batch, and where it begins. Kept until acknowledged: a call that fails must not lose it."""
        key = rank, stream
        if not self._unsent.get(key):
            if (behind := tail.behind()) > BEHIND_MOST_BYTES:
                given_up = behind - BEHIND_MOST_BYTES // 2
                tail.skip(given_up)
                # The store sees the gap between this and the next batch, and marks it.
                self._sent[key] = self._sent.get(key, 0) + given_up
            self._unsent[key] = tail.read(BATCH_BYTES)
        return self._sent.get(key, 0), self._unsent[key]
