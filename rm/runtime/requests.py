"""What was asked for, by job: the latest from memory, all others from the ledger."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from rm.ledger import Ledger
from rm.spec import JobSpec

KEPT = 2_000
KEPT_BYTES = 16 * 1024
"""Larger requests are read from the ledger each time."""


class Requests:
    """Used by the allocator's event loop."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._kept: OrderedDict[str, JobSpec] = OrderedDict()

    def keep(self, job_id: str, spec: JobSpec, size: int) -> None:
        """Remember what a job, or all jobs of an array, asked for. `size`: bytes in the ledger."""
        if size > KEPT_BYTES:
            return
        self._kept[job_id] = spec
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def at_hand(self, job_id: str) -> JobSpec | None:
        """The request, if it is remembered."""
        return self._kept.get(job_id) or self._kept.get(job_id.partition("_")[0])

    async def of(self, job_ids: Sequence[str]) -> list[JobSpec]:
        """The requests, all that are not remembered in one reading of the ledger. Raises KeyError for unknown jobs."""
        found = {job_id: spec for job_id in job_ids if (spec := self.at_hand(job_id)) is not None}
        missing = [job_id for job_id in job_ids if job_id not in found]
        if missing:
            found |= await asyncio.to_thread(self._ledger.specs, missing)
        return [found[job_id] for job_id in job_ids]
