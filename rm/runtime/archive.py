"""The actor "store": `FileStore` on the head node, apart from the allocator.

Bulk never passes through the allocator's decision path: logs, functions, working directories and results go
between clients, runners and this actor. It keeps no state of its own beyond the files, so a restart loses nothing.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from rm.store import FileStore, LastBatch, LogChunk, LogEnd, LogFile, Tidied

MOST_FOLLOWERS = 500
"""Calls of `news` that are held at a time, half of what the actor takes: logs must get through beside them."""
FOLLOW_SLICE_S = 10.0
"""Longest that one read waits for news; the reader asks again."""


class Store:
    """The actor's class. Every method is idempotent: callers retry."""

    def __init__(self, root: str, max_log_bytes: int) -> None:
        self._files = FileStore(Path(root), max_log_bytes)
        self._news: dict[str, asyncio.Event] = {}
        self._followers = 0

    async def tidy(
        self, live: set[str], needed: set[str], now: float, keep_s: float, keep_bytes: int
    ) -> Tidied:
        return await asyncio.to_thread(self._files.tidy, live, needed, now, keep_s, keep_bytes)

    async def has_blobs(self, sha256s: list[str]) -> set[str]:
        return await asyncio.to_thread(self._files.has_blobs, sha256s)

    async def put_blob(self, data: bytes) -> str:
        return await asyncio.to_thread(self._files.put_blob, data)

    async def get_blob(self, sha256: str) -> bytes:
        return await asyncio.to_thread(self._files.get_blob, sha256)

    async def put_result(self, job_id: str, attempt: int, data: bytes) -> None:
        await asyncio.to_thread(self._files.put_result, job_id, attempt, data)

    async def get_result(self, job_id: str) -> bytes | None:
        return await asyncio.to_thread(self._files.get_result, job_id)

    async def logs(self, job_id: str) -> list[LogFile]:
        return await asyncio.to_thread(self._files.logs, job_id)

    async def append_log(
        self, job_id: str, attempt: int, rank: int, stream: str, offset: int, data: bytes
    ) -> int:
        written = await asyncio.to_thread(self._files.append_log, job_id, attempt, rank, stream, offset, data)
        self._tell(job_id)
        return written

    async def end_logs(self, job_id: str, attempt: int, last: list[LastBatch]) -> None:
        await asyncio.to_thread(self._files.end_logs, job_id, attempt, last)
        self._tell(job_id)

    async def end_all_logs(self, ends: list[LogEnd]) -> dict[int, str]:
        failed = await asyncio.to_thread(self._files.end_all_logs, ends)
        for job_id, _, _ in ends:
            self._tell(job_id)
        return failed

    async def read_log(
        self, job_id: str, attempt: int, rank: int, stream: str, offset: int, max_bytes: int
    ) -> LogChunk:
        return await asyncio.to_thread(self._files.read_log, job_id, attempt, rank, stream, offset, max_bytes)

    async def news(self, job_id: str, timeout_s: float) -> bool:
        """Return when any log of the job has grown or closed, or after `timeout_s`.

        False, and at once, where too many follow logs already: whoever asks then pauses before the next time.
        """
        if self._followers >= MOST_FOLLOWERS:
            return False
        event = self._news.setdefault(job_id, asyncio.Event())
        self._followers += 1
        try:
            await asyncio.wait_for(event.wait(), min(timeout_s, FOLLOW_SLICE_S))
        except TimeoutError:
            self._news.pop(job_id, None)
        finally:
            self._followers -= 1
        return True

    def _tell(self, job_id: str) -> None:
        event = self._news.pop(job_id, None)
        if event is not None:
            event.set()
