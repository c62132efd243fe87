"""Attempts of a Ray that is no more: they give back their GPUs only when nothing of them can still be running.

When the head dies for good and Ray is started anew, raylets of the old Ray may live on elsewhere, with user code under
them, until they give up looking for their GCS: a minute, Ray's `gcs_rpc_server_reconnect_timeout_s`. The new Ray has
never heard of them. A job that ran there must not start a second time before, since both would write to the same
checkpoint.

An attempt is of an old world if Ray's table has one of its nodes neither alive nor dead. On this machine its processes
are ended; for another one the minute is waited out, counted from the start of the new head: the old one was dead then.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import ray

from rm.core.effects import Effect, Release
from rm.core.events import NodeJoined
from rm.core.model import attempt_key
from rm.runtime.nodes import NodeWatch
from rm.runtime.orders import process_mark
from rm.runtime.processes import sweep

log = logging.getLogger("rm.old_world")

MARGIN_S = 5.0
"""Beyond Ray's limit: a raylet ends its workers, and their keepers end the rest."""
LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"
LIMIT_S = 60.0


class OldWorld:
    """Stands before the gangs: holds up those releases that are too early, and passes on everything else."""

    def __init__(
        self,
        ledger_key: str,
        execute: Callable[[Iterable[Effect]], None],
        watch: NodeWatch,
        recorded: Callable[[], Mapping[str, NodeJoined]],
    ) -> None:
        self._ledger_key = ledger_key
        self._execute = execute
        self._watch = watch
        self._recorded = recorded
        self._names: dict[str, str] | None = None
        """Of the nodes that were there when the last allocator ended."""
        self._held: dict[tuple[str, int], asyncio.Task[None]] = {}

    def execute(self, effects: Iterable[Effect]) -> None:
        """Carry these out, as `Gangs.execute` does. First called with what a start finds, before a node is lost."""
        if self._names is None:
            self._names = {node_id: node.name for node_id, node in self._recorded().items()}
        for effect in effects:
            if isinstance(effect, Release) and not self._in_this_world(effect):
                key = effect.job_id, effect.attempt
                if key not in self._held:
                    task = self._held[key] = asyncio.create_task(self._hold(effect))
                    task.add_done_callback(partial(self._let_go, key))
            else:
                self._execute([effect])

    def _let_go(self, key: tuple[str, int], _: asyncio.Task[None]) -> None:
        self._held.pop(key, None)

    def _in_this_world(self, effect: Release) -> bool:
        seen = self._watch.seen
        return all(each.node_id in seen.nodes or each.node_id in seen.unheard for each in effect.placed)

    async def _hold(self, effect: Release) -> None:
        attempt = attempt_key(effect.job_id, effect.attempt)
        try:
            await self._over(effect, attempt)
        except Exception:
            log.exception("whether %s is over can't be told; its time is waited out", attempt)
            await asyncio.sleep(limit_s() + MARGIN_S)
        self._execute([effect])

    async def _over(self, effect: Release, attempt: str) -> None:
        """Return when nothing of the attempt can run any more outside of this Ray."""
        here, listed = await asyncio.to_thread(node_table)
        foreign = [
            (bundle, each.node_id) for bundle, each in enumerate(effect.placed) if each.node_id not in listed
        ]
        if not foreign:
            return
        names = self._names or {}
        for bundle, _ in foreign:
            killed = await asyncio.to_thread(sweep, process_mark(self._ledger_key, attempt, bundle))
            log.warning(
                "bundle %d of %s ran under a Ray that is gone; %d processes ended", bundle, attempt, killed
            )
        elsewhere = sorted({names.get(each) or each[:8] for _, each in foreign} - {here})
        left = limit_s() + MARGIN_S - parent_age_s()
        if elsewhere and left > 0:
            log.warning(
                "%s ran under a Ray that is gone, on %s: it may still run there, so %s waits for %.0f s",
                attempt,
                ", ".join(elsewhere),
                effect.job_id,
                left,
            )
            await asyncio.sleep(left)


def node_table() -> tuple[str, set[str]]:
    """The name of this node, and the ids of all nodes that this Ray has ever heard of, dead ones too."""
    nodes = {str(node["NodeID"]): node for node in ray.nodes()}
    me = nodes[ray.get_runtime_context().get_node_id()]
    return str(me["NodeName"] or me["NodeManagerHostname"]), set(nodes)


def limit_s() -> float:
    """How long a raylet looks for its GCS before it ends."""
    try:
        return float(os.environ[LIMIT])
    except (KeyError, ValueError):
        return LIMIT_S


def parent_age_s() -> float:
    """How long this process's parent has been running: of an actor on the head, the head's raylet."""
    stat = Path(f"/proc/{os.getppid()}/stat").read_text()
    started = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started
