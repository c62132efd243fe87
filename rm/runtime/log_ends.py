"""The ends of short logs on their way to the store: those of several attempts in one call.

Most jobs print little, and a call to another actor costs more than all that it carries. So a runner keeps what is left
of a log in memory for a moment and sends it with what else has ended meanwhile; nobody's GPUs wait for it, nor do its
files. Whoever asks for the log, or wants to end the runner, hurries it along (`hurry`).
"""

from __future__ import annotations

import asyncio
import logging
import time

from ray.exceptions import RayError

from rm.runtime.links import Link
from rm.store import LogEnd

log = logging.getLogger("rm.logs")

LINGER_S = 0.5
"""How long an end waits for others. A node that fails within that time takes it along."""
GIVE_UP_S = 60.0
"""How long the store may be unreachable; then the rest of these logs is lost, and said to be."""
AGAIN_S = 1.0


class LogEnds:
    """One runner's. Used by its event loop."""

    def __init__(self, store: Link) -> None:
        self._store = store
        self._waiting: list[tuple[LogEnd, asyncio.Future[None]]] = []
        self._hurry = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None

    async def send(self, end: LogEnd, *, at_once: bool) -> None:
        """Returns when the end is in the store, or is given up."""
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((end, sent))
        if at_once:
            self._hurry.set()
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all(), name="send the ends of logs")
        await sent

    def hurry(self) -> None:
        """Somebody waits for what is here."""
        if self._waiting:
            self._hurry.set()

    async def _send_all(self) -> None:
        while self._waiting:
            try:
                await asyncio.wait_for(self._hurry.wait(), LINGER_S)
            except TimeoutError:
                pass
            self._hurry.clear()
            batch, self._waiting = self._waiting, []
            await self._deliver([end for end, _ in batch])
            for _, sent in batch:
                if not sent.done():
                    sent.set_result(None)

    async def _deliver(self, ends: list[LogEnd]) -> None:
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            try:
                await self._store.call("end_all_logs", ends)
                return
            except (RayError, ValueError):
                if time.monotonic() > deadline:
                    log.exception("the log store can't be reached; the ends of %d logs are lost", len(ends))
                    return
                await asyncio.sleep(AGAIN_S)
