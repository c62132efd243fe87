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
from dataclasses import dataclass

from ray.exceptions import RayError

from rm.runtime.links import Link
from rm.store import LogEnd

log = logging.getLogger("rm.logs")

LINGER_S = 0.5
"""How long an end waits for others. A node that fails within that time takes it along."""
GIVE_UP_S = 60.0
"""How long it is tried to send an end; then it is lost, and said to be."""
AGAIN_S = 1.0


@dataclass(slots=True, eq=False)
class _Pending:
    """An end on its way; `sent` is done when nobody here has to see to it any more."""

    end: LogEnd
    sent: asyncio.Future[None]
    give_up_at: float

    def settle(self) -> None:
        if not self.sent.done():
            self.sent.set_result(None)


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
        self._waiting.append(_Pending(end, sent, time.monotonic() + GIVE_UP_S))
        if at_once:
            self._hurry.set()
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all(), name="send the ends of logs")
        return sent

    def hurry(self) -> None:
        """Somebody waits for what is here."""
        if self._waiting:
            self._hurry.set()

    async def delivered(self, within_s: float, job: str | None = None) -> None:
        """Returns when all that is here by now is sent, or all of one job, or `within_s` has passed."""
        pending = [each for each in self._pending() if job in (None, each.end[0])]
        await self._delivered(pending, within_s)

    async def hand_in(self, within_s: float) -> list[LogEnd]:
        """What can't be sent `within_s`: it is the caller's from now on. Twice sent is once."""
        pending = self._pending()
        await self._delivered(pending, within_s)
        left = [each for each in pending if not each.sent.done()]
        for each in left:
            each.settle()
        return [each.end for each in left]

    async def _delivered(self, pending: Sequence[_Pending], within_s: float) -> None:
        if pending:
            self.hurry()
            await asyncio.wait([each.sent for each in pending], timeout=within_s)

    def _pending(self) -> list[_Pending]:
        return [each for each in (*self._under_way, *self._waiting) if not each.sent.done()]

    async def _send_all(self) -> None:
        while self._waiting:
            try:
                await asyncio.wait_for(self._hurry.wait(), LINGER_S)
            except TimeoutError:
                pass
            self._hurry.clear()
            self._under_way, self._waiting = self._waiting, []
            failed: list[tuple[_Pending, str]] = []
            try:
                failed = await self._try([each for each in self._under_way if not each.sent.done()])
            finally:
                again = [each for each, why in failed if not self._is_given_up(each, why)]
                for each in set(self._under_way).difference(again):
                    each.settle()
                self._under_way = []
            if again:
                self._waiting[:0] = again
                await asyncio.sleep(AGAIN_S)
                self._hurry.set()

    async def _try(self, batch: list[_Pending]) -> list[tuple[_Pending, str]]:
        """Send them. Returns those that have to be sent again, and why."""
        ends = [each.end for each in batch]
        try:
            failed: dict[int, str] = await self._store.call("end_all_logs", ends)
        except AttributeError:
            # A store of before: it stays where an allocator is replaced by the next version's.
            failed = await self._try_each(ends)
        except (RayError, ValueError) as error:
            failed = dict.fromkeys(range(len(ends)), str(error))
        except Exception:
            log.exception("the ends of %d logs are lost", len(ends))
            return []
        return [(batch[place], why) for place, why in failed.items()]

    async def _try_each(self, ends: Sequence[LogEnd]) -> dict[int, str]:
        failed: dict[int, str] = {}
        for place, end in enumerate(ends):
            try:
                await self._store.call("end_logs", *end)
            except (RayError, ValueError) as error:
                failed[place] = str(error)
        return failed

    @staticmethod
    def _is_given_up(each: _Pending, why: str) -> bool:
        given_up = time.monotonic() > each.give_up_at
        if given_up:
            log.error("the end of the log of %s is lost, the store does not take it: %s", each.end[0], why)
        return given_up
