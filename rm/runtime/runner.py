"""The supervisor actor: one per bundle, it owns the processes of one attempt there, and then of the next.

It runs on the bundle's node inside the placement group, and user code never runs inside it: the child can crash, leak
or exhaust its memory without taking the runner along, and if the runner is killed its keeper takes the children along.
The allocator makes one long call per attempt, `run`; asking again (after a restart of the allocator) joins the run
under way or repeats its result, so an attempt can't run twice. Two attempts never run in it at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import sys
from dataclasses import replace

import ray

from rm.runtime import gpu_probe
from rm.runtime.bundle_run import BundleRun
from rm.runtime.links import Link
from rm.runtime.log_ends import LogEnds
from rm.runtime.nursery import Nursery
from rm.runtime.orders import RunOrder, RunResult, Seat
from rm.runtime.preloading import Preloading
from rm.runtime.workspace import Spare, scratch_root, spare_path
from rm.runtime.xid_watch import XidWatch
from rm.store import LogEnd

log = logging.getLogger("rm.runner")

EMPTY_WITHIN_S = 10.0
"""How long the driver may take to give the memory of a process back that is gone."""
LOOK_S = 0.1
HAND_IN_S = 0.5
"""How long the store may take until somebody else has to send the ends of logs: GPUs are not to wait for it."""


class Runner:
    """The actor's class. Asyncio: `run` lasts as long as the job, the other methods answer meanwhile.

    `key` in them is `RunOrder.key`: news for an attempt that is over must not meet the next one.
    """

    def __init__(self) -> None:
        self._runs: dict[str, BundleRun] = {}
        """The run under way, or the last one, those not settled, and those that are only spoken of yet."""
        self._listener = asyncio.Event()
        minds = [str(spare_path(scratch_root()))]
        self._nursery = Nursery(minds=minds)
        self._nursery.start()
        self._preloading = Preloading(minds)
        self._gpu_ids = tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))
        self._xids = XidWatch(self._gpu_ids)
        self._store = Link("store")
        self._allocator = Link("allocator")
        self._ends = LogEnds(self._store)
        self._spare = Spare()

    async def seat(self) -> Seat:
        """Where this runner is, and a port that is free there now."""
        self._nursery.prepare()
        return Seat(
            node_id=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
            port=_free_port(),
            gpu_ids=self._gpu_ids,
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
        )

    async def run(self, order: RunOrder) -> RunResult:
        """Run the bundle's ranks to their end. Idempotent: a second call waits for the same run.

        When this returns, nothing of the attempt runs here, its result is stored, and the end of its log may be on its
        way yet: see `settled`. Raises RuntimeError while another attempt runs here.
        """
        run = self._run(order.key)
        if not run.begun:
            for key, other in list(self._runs.items()):
                if other.begun and not other.ended:
                    raise RuntimeError(f"{order.key} was to run where {key} runs yet")
                if other is not run and other.is_settled:
                    del self._runs[key]
        result = await run.result(order)
        if not result.clean:
            return result
        return replace(result, clean=await self._are_empty(order), port=_free_port())

    async def started(self, key: str) -> list[int]:
        """The pids of the ranks, once they run (or the run has ended)."""
        return await self._run(key).started()

    async def settled(self, key: str) -> None:
        """Returns when the run's logs are in the store, and its files gone from here. At once where it is not known."""
        if (run := self._runs.get(key)) is not None:
            await run.settled()

    async def hand_in(self) -> list[LogEnd]:
        """Before this runner is ended: ends what still runs, sends what is left of logs. Returns what can't be sent.

        Ray ends an actor a moment after it was asked to, and its keepers what it ran another one later: by then the
        GPUs might be another's. So a run that was given up, because its group is gone say, is ended here first.
        """
        runs = [run for run in self._runs.values() if run.begun]
        await asyncio.gather(*(run.stop(0) for run in runs if not run.ended))
        await asyncio.gather(*(run.shipped() for run in runs))
        return await self._ends.hand_in(HAND_IN_S)

    async def life(self) -> None:
        """Returns when it is called again: else, whoever waits for it learns at once that this runner has died.

        So that of allocators that come and go one has a call here.
        """
        self._listener.set()
        mine = self._listener = asyncio.Event()
        await mine.wait()

    async def stop(self, key: str, grace_s: float) -> None:
        """SIGTERM to every rank's process group, SIGKILL after `grace_s`. `run` then returns."""
        await self._run(key).stop(grace_s)

    def _run(self, key: str) -> BundleRun:
        run = self._runs.get(key)
        if run is None:
            run = BundleRun(
                self._nursery,
                self._preloading,
                self._xids,
                self._store,
                self._allocator,
                self._ends,
                self._spare,
            )
            self._runs[key] = run
        return run

    async def _are_empty(self, order: RunOrder) -> bool:
        """Whether the GPUs' driver shows none of the attempt's processes, nor a stranger's, on our whole devices."""
        if not gpu_probe.can_look():
            return True
        deadline = asyncio.get_running_loop().time() + EMPTY_WITHIN_S
        while True:
            found = await asyncio.to_thread(gpu_probe.left_on, self._gpu_ids, order.key)
            if not found:
                return True
            if asyncio.get_running_loop().time() > deadline:
                log.warning("after %s there is still memory in use: %s", order.key, found)
                return False
            await asyncio.sleep(LOOK_S)


def _free_port() -> int:
    """A TCP port that is free now, below the ephemeral range so that no outgoing connection takes it first."""
    for _ in range(100):
        port = random.randint(20_000, 32_000)  # noqa: S311
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no free port from 20000 to 32000")
