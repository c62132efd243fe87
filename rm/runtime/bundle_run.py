"""One bundle's share of one attempt, from the order to the result: its files, its processes, its logs, its reports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import replace
from typing import Any

import cloudpickle
from ray.exceptions import RayError

from rm.core.model import Kind
from rm.errors import RmError
from rm.runtime.entry import modules_path, result_path
from rm.runtime.links import Link
from rm.runtime.log_ends import LogEnds
from rm.runtime.nursery import Nursery
from rm.runtime.orders import RunOrder, RunResult
from rm.runtime.preloading import Preloading
from rm.runtime.processes import Launched, LaunchOutcome, RankExit
from rm.runtime.shipping import LogShipper
from rm.runtime.tail import last_lines
from rm.runtime.workspace import Spare, Workspace, clear_stale
from rm.runtime.xid_watch import XidWatch

REPORT_S = 0.5
"""How often progress is read and passed on."""
REPORT_BYTES = 64 * 1024
"""A larger report is not passed on: the allocator keeps the latest of 2,000 jobs."""
TAIL_LINES = 20
XID_WITHIN_S = 0.2
"""How long after a rank's failure the driver may take to tell of an error."""
_NODE_FAILED = frozenset({"keeper_lost", "stuck", "no_process"})
"""Kinds of exit that are not the fault of user code."""


class BundleRun:
    """Made by whoever speaks of it first: a stop may come before the order."""

    def __init__(
        self,
        nursery: Nursery,
        preloading: Preloading,
        xids: XidWatch,
        store: Link,
        allocator: Link,
        ends: LogEnds,
        spare: Spare,
    ) -> None:
        self._nursery = nursery
        self._preloading = preloading
        self._xids = xids
        self._store = store
        self._allocator = allocator
        self._ends = ends
        self._spare = spare
        self._task: asyncio.Task[RunResult] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._shipped = asyncio.Event()
        self._shipper: LogShipper | None = None
        self._started: asyncio.Event = asyncio.Event()
        self._launched: Launched | None = None
        self._workspace: Workspace | None = None
        self._stop_asked = False
        self._is_awaited = False
        """Whether the end of its logs is."""
        self._progress: dict[int, dict[str, Any]] = {}

    @property
    def begun(self) -> bool:
        return self._task is not None

    @property
    def ended(self) -> bool:
        return self._task is not None and self._task.done()

    @property
    def is_settled(self) -> bool:
        return self._settling is not None and self._settling.done()

    async def settled(self) -> None:
        """Returns when the run has ended, its logs are in the store, and its files are gone."""
        if self._task is not None:
            self._is_awaited = True
            await asyncio.wait([self._task])
        if self._settling is not None and not self._settling.done():
            self._ends.hurry()
            await asyncio.wait([self._settling])

    async def shipped(self) -> None:
        """Of a run that has begun: returns when it has ended, and what is left of its logs, if anything is, is with the
        `ends`."""
        self._is_awaited = True
        await self._shipped.wait()

    async def result(self, order: RunOrder) -> RunResult:
        """Run the ranks to their end; a second call waits for the same run."""
        if self._task is None:
            self._task = asyncio.create_task(self._supervise(order))
        return await asyncio.shield(self._task)

    async def started(self) -> list[int]:
        """The pids of the ranks, once they run (or the run has ended)."""
        await self._started.wait()
        return list(self._launched.pids.values()) if self._launched else []

    async def stop(self, grace_s: float) -> None:
        """SIGTERM to every rank's process group, SIGKILL after `grace_s`. `result` then returns."""
        self._stop_asked = True
        # Not when it is being removed: what is made in it then would stay for ever.
        if self._workspace is not None and self._settling is None:
            self._workspace.ask_to_stop()
        if self._launched is not None:
            await self._launched.stop(grace_s)

    async def _supervise(self, order: RunOrder) -> RunResult:
        workspace = self._workspace = Workspace(order, spare=self._spare)
        try:
            result = await self._run_in(workspace, order)
            self._is_awaited |= not result.ok  # who failed will be asked why
            return result
        except RmError as error:
            return RunResult(ok=False, rank=order.first_rank, message=error.message, failed_at=time.time())
        except OSError as error:
            where = f"{workspace.path} on {order.node_name}"
            return RunResult(ok=False, rank=order.first_rank, message=f"can't prepare {where}: {error}")
        finally:
            self._started.set()
            # Nobody who waits for the GPUs needs to wait for this.
            self._settling = asyncio.create_task(self._settle(workspace))

    async def _settle(self, workspace: Workspace) -> None:
        sending: asyncio.Future[None] | None = None
        try:
            if self._shipper is not None and (end := await self._shipper.finish()) is not None:
                sending = self._ends.send(end, at_once=self._is_awaited)
            self._shipped.set()  # meanwhile the files go, which may be many
            with contextlib.suppress(FileNotFoundError):
                imported = modules_path(workspace.result).read_text().split()
                self._preloading.learn(workspace.processes()[0], imported)
        finally:
            self._shipped.set()
            try:
                if not workspace.give_back():
                    await asyncio.to_thread(workspace.remove)
                if workspace.is_look_due():
                    await asyncio.to_thread(clear_stale, workspace.path.parent)
            finally:
                if sending is not None:
                    await sending

    async def _run_in(self, workspace: Workspace, order: RunOrder) -> RunResult:
        store = self._store
        payload = working_dir = None
        if order.kind is Kind.FUNCTION:
            payload = await store.call("get_blob", order.payload_sha256)
        if order.working_dir_sha256:
            working_dir = await store.call("get_blob", order.working_dir_sha256)
        if payload is None and working_dir is None:
            workspace.create(None, None)  # takes less than a change of threads
        else:
            await asyncio.to_thread(workspace.create, payload, working_dir)
        processes = workspace.processes()
        if self._stop_asked:
            return RunResult(ok=False, stopped=True, message="stopped before it started")
        shipper = LogShipper(store, order, processes)
        nursery = self._preloading.nursery(processes) or self._nursery
        self._xids.take()  # what comes late from the one before
        attempt = f"{order.job_id}.{order.attempt}"
        self._launched = await Launched.start(
            attempt, processes, order.grace_s, nursery, [str(workspace.path)]
        )
        self._shipper = shipper
        self._started.set()
        if self._stop_asked:
            await self._launched.stop(order.grace_s)
        background = [asyncio.create_task(shipper.run()), asyncio.create_task(self._pass_on_reports(order))]
        try:
            outcome = await self._launched.wait()
            nursery.prepare()  # where the keeper does not stay
            # A stop that comes from now on finds nobody: they ended by themselves.
            stopped = self._stop_asked
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
        self._read_reports(order)
        result = await self._with_xids(self._result(workspace, order, outcome, stopped))
        if order.kind is Kind.FUNCTION:
            try:
                await self._keep_result(store, workspace, order, result)
            except (RayError, ValueError) as error:
                # The function has run: doing it all again because its result got lost is not ours to decide.
                return replace(result, ok=False, message=f"its result could not be stored: {error}")
        return result

    @staticmethod
    async def _keep_result(store: Link, workspace: Workspace, order: RunOrder, result: RunResult) -> None:
        """Send rank 0's value, or the exception of the rank that failed, to the store."""
        rank = 0 if result.ok else result.rank or 0
        path = result_path(workspace.result, rank)
        if (result.ok and order.first_rank != 0) or result.stopped or not path.exists():
            return
        data = await asyncio.to_thread(path.read_bytes)
        await store.call("put_result", order.archive_id, order.attempt, data)

    def _result(
        self, workspace: Workspace, order: RunOrder, outcome: LaunchOutcome, stopped: bool
    ) -> RunResult:
        progress = _aged(self._progress[0]) if 0 in self._progress else None
        clean = not outcome.stuck
        failed = next((each for each in outcome.exits if each.rank == outcome.first_failed), None)
        if failed is None:
            failed = next((each for each in outcome.exits if each.failed), None)
        if failed is None:
            return RunResult(ok=True, began=True, progress=progress, stopped=stopped, clean=clean)
        return RunResult(
            ok=False,
            began=True,
            rank=failed.rank,
            exit_code=failed.code,
            signal=failed.signal,
            message=_raised(workspace, order, failed) or _describe(failed, order.node_name),
            tail=tuple(_tail(workspace, failed.rank)),
            lost=failed.error_kind in _NODE_FAILED,
            stopped=stopped and outcome.first_failed is None,
            progress=progress,
            failed_at=failed.at,
            clean=clean and failed.error_kind not in _NODE_FAILED,
        )

    async def _with_xids(self, result: RunResult) -> RunResult:
        """The result, and what the driver reported meanwhile: that may tell why a rank failed, and through whom."""
        if result.ok:
            return replace(result, xids=self._xids.take())
        # The driver's report of what has killed a process can come after its death.
        xids = await asyncio.to_thread(self._xids.take, XID_WITHIN_S)
        if not xids:
            return result
        message = "; ".join([result.message, *map(str, xids)])
        lost = result.lost or (any(each.infra for each in xids) and not result.stopped)
        return replace(result, xids=xids, message=message, lost=lost)

    async def _pass_on_reports(self, order: RunOrder) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            if self._read_reports(order) and order.first_rank == 0:
                # Progress is a courtesy: what can't be passed on now is passed on with the next.
                with contextlib.suppress(RayError, ValueError):
                    report = _aged(self._progress[0])
                    await self._allocator.call("progress", order.job_id, order.attempt, report, give_up_s=5)

    def _read_reports(self, order: RunOrder) -> bool:
        """Take in what ranks reported. True where rank 0 said something new."""
        assert self._workspace is not None
        news = False
        for rank in range(order.first_rank, order.first_rank + order.local_world):
            try:
                path = self._workspace.report_path(rank)
                if path.stat().st_size > REPORT_BYTES:
                    continue  # not written by `rm.report`, which mostly keeps within it
                report = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            news |= rank == 0 and report != self._progress.get(rank)
            self._progress[rank] = report
        return news


def _aged(report: dict[str, Any]) -> dict[str, Any]:
    """The report as it leaves the node: with the age of its checkpoint, because the clocks of nodes differ.

    The age is on the monotonic clock, which all processes of a node share: the wall may have been stepped meanwhile.
    """
    aged = dict(report)
    at = aged.pop("checkpoint_monotonic", None)
    if isinstance(at, int | float):
        aged["checkpoint_age_s"] = max(0.0, time.monotonic() - at)
    return aged


def _describe(exit_: RankExit, node_name: str) -> str:
    """One sentence: which rank, how it ended, and where."""
    where = f"rank {exit_.rank} on {node_name}"
    if exit_.error:
        return f"{where}: {exit_.error.removeprefix(f'rank {exit_.rank}: ')}"
    if exit_.signal is not None:
        hint = " (out of memory?)" if exit_.signal_name == "SIGKILL" else ""
        return f"{where} was killed by {exit_.signal_name}{hint}"
    hint = {126: " (can't be executed?)", 127: " (command not found?)"}.get(exit_.code or 0, "")
    return f"{where} exited with code {exit_.code}{hint}"


def _raised(workspace: Workspace, order: RunOrder, exit_: RankExit) -> str | None:
    """For a function that raised: the exception in one line."""
    path = result_path(workspace.result, exit_.rank)
    if order.kind is not Kind.FUNCTION or not path.exists():
        return None
    error = cloudpickle.loads(path.read_bytes()).get("error") or {}
    if not error or error["type"] == "SystemExit":
        return None
    first_line = (error["message"].splitlines() or [""])[0]
    return f"rank {exit_.rank} on {order.node_name} raised {error['type']}: {first_line}"


def _tail(workspace: Workspace, rank: int) -> list[str]:
    """The last lines on stderr, or on stdout where stderr is silent."""
    for stream in ("err", "out"):
        path = workspace.log_path(rank, stream)
        if path.exists() and (lines := last_lines(str(path), TAIL_LINES)):
            return lines
    return []
