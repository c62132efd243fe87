"""Idempotency keys: which requests of a submission were accepted before.

A client draws a key for each request. Where the answer is lost, because the allocator dies or Ray makes the call again,
the second call finds the first one's jobs by it. The ledger knows every key; to ask it takes a fifth of what a single
submission takes. So a client also says for which life of the allocator it has drawn them: what this very process has
accepted it remembers, as long as a call can be on its way.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Sequence

from rm.ledger import Ledger
from rm.spec import JobSpec

KEPT = 10_000
"""Keys that are remembered."""
FEW = 8
"""A submission of more requests asks the ledger: what that takes is shared by all of them."""


class Keys:
    """Used by the allocator's event loop. `life`: new with each process."""

    def __init__(self, ledger: Ledger) -> None:
        self.life = uuid.uuid4().hex
        self._ledger = ledger
        self._accepted: OrderedDict[str, str] = OrderedDict()

    async def known(self, specs: Sequence[JobSpec], keys: Sequence[str], life: str) -> dict[str, str]:
        """Key → what `submit` returned for it, of those that were accepted before.

        `life`: the one that the keys were drawn for.
        """
        if life == self.life and len(keys) <= FEW:
            return {key: self._accepted[key] for key in keys if key in self._accepted}
        return await self.stored(specs, keys)

    async def stored(self, specs: Sequence[JobSpec], keys: Sequence[str]) -> dict[str, str]:
        """The same, as the ledger has it."""
        found = await asyncio.to_thread(self._ledger.submitted, keys)
        each = zip(specs, keys, strict=True)
        return {key: _submission_id(spec, found[key]) for spec, key in each if key in found}

    def accepted(self, keys: Sequence[str], submission_ids: Sequence[str]) -> None:
        """The requests of a submission were accepted."""
        if len(keys) > FEW:
            return  # they are looked up, and would make those forgotten that are not
        self._accepted |= zip(keys, submission_ids, strict=True)
        while len(self._accepted) > KEPT:
            self._accepted.popitem(last=False)


def _submission_id(spec: JobSpec, first_job: str) -> str:
    """What `submit` returns for a request whose first job has this id."""
    return first_job if spec.array is None else first_job.removesuffix("_0")
