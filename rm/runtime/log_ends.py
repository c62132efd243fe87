"""The ends of short logs on their way to the store: those of several attempts in one call.

Most jobs print little, and a call to another actor costs more than all that it carries. So a runner keeps what is left
of a log in memory for a moment and sends it with what else has ended meanwhile; nobody's GPUs wait for it, nor do its
files. Whoever asks for the log hurries it along (`hurry`). Whoever wants to end the runner has it handed in (`hand_in`)
where the store can't be reached, and sends it in its place: the allocator has one of these too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from ray.exceptions import RayError

from rm.runtime.links import Link
from rm.store import LogEnd

log = logging.getLogger("rm.logs")

LINGER_S = 0.5
"""How long an end waits for others. A node that fails within that time takes it along."""
GIVE_UP_S = 60.0
"""How long the store may be unreachable; then the rest of these logs is lost, and said to be."""
AGAIN_S = 1.0
_Pending = tuple[LogEnd, "asyncio.Future[None]"]


class LogEnds:
    """Those that one process sends. Used by its event loop."""

    def __init__(self, store: Link) -> None:
        self._store = store
        self._waiting: list[_Pending] = []
        self._under_way: list[_Pending] = []
        self._hurry = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None

    def send(self, end: LogEnd, *, at_once: bool) -> asyncio.Future[None]:
        """Done when the end is in the store, or somebody else's, or is given up."""
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((end, sent))
        if at_once:
            self._hurry.set()
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all(), name="send the ends of logs")
        return sent

    def hurry(self) -> None:
        """Somebody waits for what is here."""
        if self._waiting:
            self._hurry.set()

    async def delivered(self, within_s: float) -> None:
        """Returns when all that is here by now is sent, or `within_s` has passed."""
        await self._delivered(self._pending(), within_s)

    async def hand_in(self, within_s: float) -> list[LogEnd]:
        """What can't be sent `within_s`: it is the caller's from now on. Twice sent is once."""
        pending = self._pending()
        await self._delivered(pending, within_s)
        left = [each for each in pending if not each[1].done()]
        _settle(left)
        return [end for end, _ in left]

    async def _delivered(self, pending: Sequence[_Pending], within_s: float) -> None:
        if pending:
            self.hurry()
            await asyncio.wait([sent for _, sent in pending], timeout=within_s)

    def _pending(self) -> list[_Pending]:
        return [each for each in (*self._under_way, *self._waiting) if not each[1].done()]

    async def _send_all(self) -> None:
        while self._waiting:
            try:
                await asyncio.wait_for(self._hurry.wait(), LINGER_S)
            except TimeoutError:
                pass
            self._hurry.clear()
            self._under_way, self._waiting = self._waiting, []
            try:
                await self._deliver([end for end, _ in self._under_way])
            finally:
                _settle(self._under_way)
                self._under_way = []

    async def _deliver(self, ends: list[LogEnd]) -> None:
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            try:
                await end_logs(self._store, ends)
                return
            except (RayError, ValueError):
                if time.monotonic() > deadline:
                    log.exception("the log store can't be reached; the ends of %d logs are lost", len(ends))
                    return
                await asyncio.sleep(AGAIN_S)
            except Exception:
                log.exception("the ends of %d logs can't be sent", len(ends))
                return


async def end_logs(store: Link, ends: list[LogEnd]) -> None:
    """Have the store end these logs. Raises what a `Link` raises."""
    try:
        await store.call("end_all_logs", ends)
    except AttributeError:
        # A store of before: it stays where an allocator is replaced by the next version's.
        for end in ends:
            await store.call("end_logs", *end)


def _settle(some: Sequence[_Pending]) -> None:
    for _, sent in some:
        if not sent.done():
            sent.set_result(None)
