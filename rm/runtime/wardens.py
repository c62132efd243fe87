"""Actors that do nothing but have a GPU, so that Ray gives it to nobody: what a quarantine is made of.

Ray chooses which of a node's free GPUs somebody gets, and always the first of them. So to leave some of a node's GPUs
unused does not keep anybody from the one that a stray is on: it has to be taken. `seize` takes all that are free
there, one warden each, asks every warden which GPU it got, and lets those go that are not wanted. The core gives
nothing of the node to anybody meanwhile.

Wardens are detached, and are found again by their names: they outlive the allocator as runners do, so that no job
gets a GPU in quarantine between its death and the first audit of the next. They use nothing of the GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Iterable

import ray
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rm.core.resources import GPU_UNIT
from rm.runtime.runners import NAMESPACE

log = logging.getLogger("rm.wardens")

ANSWER_S = 20.0
"""How long a warden may take to start and to say which GPU it has."""


class Warden:
    """The actor's class."""

    def gpu(self) -> str:
        """Which GPU it has, as Ray names it: a number on the node, but for nodes whose GPUs have other names."""
        ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return ids[0] if ids else ""


class Wardens:
    """Those of one ledger's allocator, by node."""

    def __init__(self, ledger_key: str) -> None:
        self._prefix = f"rm-warden/{ledger_key}/"
        self._of: dict[str, dict[str, str | None]] = {}
        """Node id → name of a warden → its GPU, None where it has not been asked."""
        self._closed = False
        self.unnamed = False
        """Whether the last that were seized have GPUs with names which are no numbers."""

    async def find(self) -> None:
        """Those that another allocator has left. Raises what Ray raises."""
        for name in await asyncio.to_thread(self._names):
            self._of.setdefault(name.removeprefix(self._prefix).partition("/")[0], {})[name] = None

    def units(self, node_id: str) -> int:
        """GPU units that they have on the node."""
        return len(self._of.get(node_id, {})) * GPU_UNIT

    def nodes(self) -> list[str]:
        return list(self._of)

    def gpus(self, node_id: str) -> set[int]:
        """The GPUs that they have on the node, as far as they have told."""
        return {int(gpu) for gpu in self._of.get(node_id, {}).values() if gpu is not None and gpu.isdecimal()}

    async def look(self, alive: Iterable[str]) -> None:
        """Forget wardens that died, with their nodes or alone; ask those that have not told which GPU they have."""
        if not self._of:
            return
        names = await asyncio.to_thread(self._names)
        for node_id in list(self._of):
            here = self._of[node_id] = {
                name: gpu for name, gpu in self._of[node_id].items() if name in names and node_id in alive
            }
            await asyncio.gather(*(self._ask(node_id, name) for name, gpu in here.items() if gpu is None))
            if not here:
                del self._of[node_id]

    async def seize(self, node_id: str, free: int, wanted: Iterable[int]) -> set[int]:
        """Take those of the `wanted` GPUs that are among the node's `free` ones. Returns which were got."""
        if self._closed:
            return set()
        names = [f"{self._prefix}{node_id}/{secrets.token_hex(4)}" for _ in range(free)]
        before = self.gpus(node_id)
        self._of.setdefault(node_id, {}).update(dict.fromkeys(names))
        await asyncio.to_thread(_start, names, node_id)
        await asyncio.gather(*(self._ask(node_id, name) for name in names))
        got = self.gpus(node_id) - before
        told = [self._of[node_id].get(name) for name in names]
        self.unnamed = any(gpu is not None and not gpu.isdecimal() for gpu in told)
        await self.release(node_id, keep=before | (got & set(wanted)))
        return got & set(wanted)

    async def release(self, node_id: str, keep: Iterable[int] = ()) -> None:
        """End the node's wardens, but for those of the GPUs to `keep`. Also those that never came up."""
        kept = {str(gpu) for gpu in keep}
        here = self._of.get(node_id, {})
        over = [name for name, gpu in here.items() if gpu not in kept]
        await asyncio.to_thread(_end, over)
        for name in over:
            del here[name]
        if not here:
            self._of.pop(node_id, None)

    async def close(self) -> None:
        """End all of them, for good."""
        self._closed = True
        for node_id in self.nodes():
            await self.release(node_id)

    async def _ask(self, node_id: str, name: str) -> None:
        try:
            warden = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
            self._of[node_id][name] = await asyncio.wait_for(warden.gpu.remote(), ANSWER_S)
        except Exception as error:
            # It waits for a GPU that somebody else has got, or it died: `release` and `look` deal with both.
            log.info("%s does not say which GPU it has (%s)", name, type(error).__name__)

    def _names(self) -> set[str]:
        return {
            str(each["name"])
            for each in list_named_actors(all_namespaces=True)
            if each["namespace"] == NAMESPACE and str(each["name"]).startswith(self._prefix)
        }


def _start(names: Iterable[str], node_id: str) -> None:
    for name in names:
        ray.remote(Warden).options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_gpus=1,
            num_cpus=0,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote()


def _end(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(ValueError):  # it has ended by itself
            ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
