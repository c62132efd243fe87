"""Who holds attached jobs and leases, and when each was last heard of.

Deadlines are on the monotonic clock and live in memory only: after a restart of the allocator every holder gets
its whole time again, because nobody could have been heard meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Holders:
    """Job id → how long its holder may still be silent."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._ttl_s: dict[str, float] = {}
        self._deadline: dict[str, float] = {}

    def add(self, job_id: str, ttl_s: float) -> None:
        self._ttl_s[job_id] = ttl_s
        self._deadline[job_id] = self._now() + ttl_s

    def heard(self, job_id: str) -> bool:
        """The holder spoke. False where the job has no holder (any more)."""
        if job_id not in self._ttl_s:
            return False
        self._deadline[job_id] = self._now() + self._ttl_s[job_id]
        return True

    def drop(self, job_id: str) -> None:
        self._ttl_s.pop(job_id, None)
        self._deadline.pop(job_id, None)

    def silent(self) -> list[str]:
        """The jobs whose holder was silent for too long; each is named once."""
        now = self._now()
        lost = [job_id for job_id, deadline in self._deadline.items() if deadline <= now]
        for job_id in lost:
            self.drop(job_id)
        return lost
