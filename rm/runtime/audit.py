"""The allocator's audit of itself: looks, compares (`rm.core.audit`), looks again, repairs.

    ledger ─ Ray ─ ledger ─► differences ─ pause ─ the same again ─► confirmed ─► repairs ─► look: are they gone?

Nothing is held up by it: Ray is read in a thread, and only if there is a difference is there more than one look.
A repair of the state is an event for the writer like any other; groups and actors of ours that nobody owns are ended
directly. What bears another ledger's name, or none of ours, is never touched.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rm.core.audit import (
    BookedNode,
    CondemnNode,
    DriverLook,
    EndProcesses,
    Fault,
    Finding,
    GpuProcess,
    KeepFromUse,
    KillRunner,
    LedgerLook,
    LiveAttempt,
    LoseAttempt,
    RayGroup,
    RayLook,
    RayNode,
    RemoveGroup,
    confirmed,
    differences,
    doubtful,
    gpu_errors,
    gpus_in_use,
    left_behind,
    still_in_use,
    strays_among,
    without_kept,
)
from rm.core.events import Event, GpuErrorsSeen, GpusQuarantined, RunLost
from rm.core.model import Job, Kind, Node, Stray, attempt_key
from rm.core.resources import GPU_UNIT
from rm.runtime import gpu_probe
from rm.runtime.gangs import Gangs
from rm.runtime.nodes import read_nodes
from rm.runtime.orders import process_mark
from rm.runtime.placements import Placements
from rm.runtime.processes import sweep
from rm.runtime.runners import Runners
from rm.runtime.stands import Stands
from rm.runtime.stays import Stays
from rm.runtime.wardens import Wardens
from rm.runtime.writer import View
from rm.views import AuditView, FindingView

log = logging.getLogger("rm.audit")

SECOND_LOOK_S = 2.0
"""At least so long between two looks. Ray reports resources every 100 ms, and a commit takes less."""
REPAIRED_S = 10.0
"""How long a repair may take to show."""
LOOK_AGAIN_S = 0.25
PROBE_S = 20.0
"""How long a node may take to read its GPUs, the start of a worker included."""
FINDINGS_KEPT = 100
NOT_REPAIRED = "could not be repaired"
LASTING = frozenset({Fault.GPU_IN_USE, Fault.GPU_ERRORS})
"""What may be so for days: it is listed as long as it is, and told of once."""
NAMED = 5
"""Nodes that a note names; it counts the others."""


class Audit:
    """Compares, repairs, remembers. Runs in the writer's event loop; one audit at a time."""

    def __init__(
        self,
        ledger_key: str,
        placements: Placements,
        runners: Runners,
        stands: Stands,
        gangs: Gangs,
        wardens: Wardens,
        stays: Stays,
        *,
        view: Callable[[], View],
        request: Callable[[Event], Awaitable[None]],
        clock: Callable[[], float],
        node_poll_s: float,
        every_s: float,
    ) -> None:
        self._every_s = every_s
        self._ledger_key = ledger_key
        self._placements = placements
        self._runners = runners
        self._stands = stands
        self._gangs = gangs
        self._wardens = wardens
        self._stays = stays
        self._view = view
        self._request = request
        self._clock = clock
        # A node that comes or goes is known to the ledger one reading of the watch later.
        self._pause_s = max(SECOND_LOOK_S, 2 * node_poll_s)
        self._one_at_a_time = asyncio.Lock()
        self._strangers: set[str] = set()
        """Ids of committed groups that are known not to be ours: they keep their names."""
        self._blind: dict[str, str] = {}
        """Nodes without NVML, and why: asked once."""
        self._immortal: set[tuple[str, int]] = set()
        """Node and pid of what an ended attempt left behind and SIGKILL did not end."""
        self._unnamed: set[str] = set()
        """Nodes whose GPUs Ray names otherwise than the driver: which of them is free can't be found out."""
        self._strays: dict[str, tuple[Stray, ...]] = {}
        """What was last said to the core of the GPUs in quarantine, by node."""
        self._kept: deque[FindingView] = deque(maxlen=FINDINGS_KEPT)
        self._condemned: dict[str, str] = {}
        """By node, what its driver said when the core was last told."""
        self.last: AuditView | None = None

    async def run(self) -> None:
        """Audit for ever. An audit that fails (the GCS restarts) is logged, and the next one comes."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.audit()
            except Exception:
                log.warning("the audit failed; the next is in %g s", self._every_s, exc_info=True)

    async def audit(self) -> AuditView:
        """One audit. Raises what Ray raises where its tables can't be read."""
        async with self._one_at_a_time:
            at, began = self._clock(), time.monotonic()
            look = await self._look()
            found: list[Finding] = []
            if look.found:
                await asyncio.sleep(self._pause_s)
                first, look = look, await self._look()
                found = confirmed(first.found, look.found)
            findings = tuple(await self._repair(found, look))
            await self._settle_quarantines(look)
            known = {(each.kind, each.what) for each in self.last.findings} if self.last else set()
            news = [
                each for each in findings if each.kind not in LASTING or (each.kind, each.what) not in known
            ]
            for each in news:
                log.warning("%s; %s", each.message, each.repair)
            self._kept.extend(news)
            self.last = AuditView(
                at=at,
                took_s=time.monotonic() - began,
                checked=look.counts(),
                not_checked=look.unread,
                findings=findings,
                recent=tuple(self._kept),
            )
            return self.last

    # --- looking -------------------------------------------------------------------------------------------

    async def _look(self) -> _Look:
        """The ledger, Ray's tables, the drivers, and all differences."""
        ledger, tables, found = await self._compare()
        await self._wardens.look(tables.nodes.keys() | tables.unheard)
        probed, unread = await self._read_gpus(tables.nodes)
        live = self._marks(ledger) | self._marks(self._ledger_look())
        for node_id, driver in probed.items():
            node = tables.nodes[node_id]
            found += gpu_errors(node_id, node, driver.conditions)
            if node.free_units >= GPU_UNIT or self._wardens.units(node_id):
                found += self._gpu_differences(node_id, node, driver.processes, live)
        processes = {node_id: driver.processes for node_id, driver in probed.items()}
        return _Look(ledger, tables, found, processes, live, tuple(unread))

    def _marks(self, ledger: LedgerLook) -> set[str]:
        """Those of the processes of live attempts."""
        return {
            process_mark(self._ledger_key, each.key, bundle)
            for each in ledger.attempts.values()
            for bundle in range(len(each.placed))
        }

    def _gpu_differences(
        self, node_id: str, node: RayNode, processes: Iterable[GpuProcess], live: set[str]
    ) -> list[Finding]:
        """What is on the node's GPUs and should not be."""
        left = [
            each
            for each in left_behind(node_id, node, processes, live, self._ledger_key)
            if (node_id, each.evidence["pid"]) not in self._immortal
        ]
        ends = {each.evidence["pid"] for each in left}
        strangers = [each for each in processes if each.pid not in ends]
        kept = self._wardens.gpus(node_id)
        others = [each for each in strangers if each.gpu not in kept]
        return [
            *left,
            *still_in_use(node_id, node, strangers, live, kept),
            *gpus_in_use(node_id, without_kept(node, len(kept)), others, live),
        ]

    async def _compare(self) -> tuple[LedgerLook, RayLook, list[Finding]]:
        before = self._ledger_look()
        tables = await asyncio.to_thread(self._read_ray, before)
        after = self._ledger_look()
        return after, tables, differences(before, tables, after)

    def _ledger_look(self) -> LedgerLook:
        view = self._view()
        attempts = [self._live(job) for job in view.jobs.values() if job.attempt]
        nodes = {node.id: _booked(node) for node in view.nodes.values()}
        return LedgerLook({each.key: each for each in attempts}, nodes)

    def _live(self, job: Job) -> LiveAttempt:
        assert job.attempt is not None
        return LiveAttempt(
            job.id,
            job.attempt.number,
            job.attempt.phase,
            job.attempt.placed,
            job.gang.bundle.gpu_units,
            self._placements.group_id(attempt_key(job.id, job.attempt.number)),
            has_runners=job.kind is not Kind.LEASE,
            followed=self._gangs.follows(job.id, job.attempt.number),
        )

    def _read_ray(self, ledger: LedgerLook) -> RayLook:
        """Ray's nodes, our runners, and those groups that have to be looked up. Runs in a thread.

        Not the whole table of groups: Ray keeps in it every group that there ever was. What was taken over bears the
        name of its present attempt here; stands that nobody has at present are left out, they have an end of their own,
        and so have the groups that keep idle nodes.
        """
        unused = self._stands.unused()
        idle = self._stands.unused_groups() | self._stays.groups()
        seen = read_nodes()
        nodes = {
            node.id: RayNode(
                node.name,
                node.gpu_units,
                node.free_gpu_units,
                {group_id: amounts[0] for group_id, amounts in node.groups.items() if group_id not in idle},
            )
            for node in seen.nodes.values()
        }
        asked = doubtful(ledger, nodes)
        self._strangers &= asked
        groups = {}
        for group_id in asked - self._strangers:
            found = self._placements.look_up(group_id)
            if found is None:
                continue
            attempt, entry = found
            if not attempt:
                self._strangers.add(group_id)
                continue
            where = tuple(str(node_id or "") for node_id in entry["bundles_to_node_id"].values())
            groups[group_id] = RayGroup(self._placements.holder(attempt), str(entry["state"]), where)
        names = [each.rpartition("/") for each in self._runners.list_names()]
        runners = {
            f"{self._placements.holder(name)}/{bundle}" for name, _, bundle in names if name not in unused
        }
        return RayLook(nodes, groups, frozenset(runners), seen.unheard)

    async def _read_gpus(self, nodes: Mapping[str, RayNode]) -> tuple[dict[str, DriverLook], list[str]]:
        """What the driver of each node with GPUs says: a task that needs nothing, pinned to it."""
        self._blind = {node_id: why for node_id, why in self._blind.items() if node_id in nodes}
        seeing = [
            each for each, node in nodes.items() if node.gpu_units >= GPU_UNIT and each not in self._blind
        ]
        answers = await asyncio.gather(*(_probe(node_id) for node_id in seeing))
        probed: dict[str, DriverLook] = {}
        passing: dict[str, str] = {}
        for node_id, answer in zip(seeing, answers, strict=True):
            if isinstance(answer, str):
                (self._blind if answer.startswith("no NVML") else passing)[node_id] = answer
            else:
                probed[node_id] = answer
        where: dict[str, list[str]] = {}
        for node_id, why in (self._blind | passing).items():
            where.setdefault(why, []).append(nodes[node_id].name)
        unread = [f"GPU memory on {_names(names)} not checked: {why}" for why, names in where.items()]
        return probed, unread

    # --- repairing -----------------------------------------------------------------------------------------

    async def _repair(self, found: Iterable[Finding], look: _Look) -> list[FindingView]:
        """Carry out every repair, then look until they show. Returns the findings as readers get them."""
        at, done = self._clock(), {}
        for each in found:
            if each.repair is None:
                continue
            try:
                done[each.kind, each.what] = await self._carry_out(each.repair, look)
            except Exception as error:
                log.warning("the repair of %s failed", each.what, exc_info=True)
                done[each.kind, each.what] = f"{NOT_REPAIRED}: {error}"
        left = set(done)
        deadline = time.monotonic() + REPAIRED_S
        while left and time.monotonic() < deadline:
            _, _, again = await self._compare()
            left &= {(each.kind, each.what) for each in again}
            if left:
                await asyncio.sleep(LOOK_AGAIN_S)
        # In quarantine it does no harm, but somebody has to end it all the same.
        left |= {
            (each.kind, each.what) for each in found if isinstance(each.repair, KeepFromUse | CondemnNode)
        }
        left |= {what for what, words in done.items() if words.startswith(NOT_REPAIRED)}
        return [_finding_view(each, at, done.get((each.kind, each.what)), left) for each in found]

    async def _carry_out(
        self,
        repair: RemoveGroup | KillRunner | LoseAttempt | EndProcesses | KeepFromUse | CondemnNode,
        look: _Look,
    ) -> str:
        """Returns what was done, in words."""
        match repair:
            case RemoveGroup(group_id):
                await self._placements.remove_by_id(group_id)
                return "removed"
            case KillRunner(name):
                await self._runners.kill_one(name)
                return "killed"
            case LoseAttempt(job_id, attempt, why):
                await self._request(RunLost(self._clock(), job_id, attempt, why))
                return f"attempt {attempt} of {job_id} ended as lost"
            case EndProcesses(node_id, mark):
                return await self._end_processes(node_id, mark)
            case KeepFromUse(node_id, gpus):
                return await self._keep_from_use(node_id, gpus, look)
            case CondemnNode(node_id, why):
                return await self._condemn(node_id, why)

    async def _end_processes(self, node_id: str, mark: str) -> str:
        if mark in self._marks(self._ledger_look()):
            return "left alone: its attempt lives"
        killed = await _on(node_id, sweep, mark)
        driver = await _probe(node_id)
        if isinstance(driver, str):
            return f"{NOT_REPAIRED}: {driver}"
        if left := {each.pid for each in driver.processes if each.owner == mark}:
            # From now on it is a stray like any other: its GPU is kept from use.
            self._immortal |= {(node_id, pid) for pid in left}
            return f"{NOT_REPAIRED}: process {min(left)} outlives SIGKILL, or belongs to another user"
        return f"killed ({killed} {'process' if killed == 1 else 'processes'})"

    async def _condemn(self, node_id: str, why: str) -> str:
        """Tell the core, once: an administrator who uncordons the node knows what he does until there is news."""
        if self._condemned.get(node_id) != why:
            await self._request(GpuErrorsSeen(self._clock(), node_id, why))
            self._condemned[node_id] = why
        node = self._view().nodes.get(node_id)
        return "the node is cordoned" if node is not None and node.cordoned else "reported only"

    # --- quarantine ----------------------------------------------------------------------------------------

    async def _keep_from_use(self, node_id: str, gpus: tuple[int, ...], look: _Look) -> str:
        """Take those of the GPUs that are free, so that nobody gets them."""
        if self._wardens.gpus(node_id) & set(gpus):
            return "in quarantine"
        if node_id in self._unnamed:
            return "reported only: Ray names the GPUs of this node otherwise than the driver"
        node = look.tables.nodes[node_id]
        # Which of the free ones Ray gives to whom is not known before: nobody gets any until it is.
        await self._quarantine(node_id, node.gpu_units // GPU_UNIT, look)
        free = node.free_units // GPU_UNIT
        got = await self._wardens.seize(node_id, free, gpus)
        if not got and self._wardens.unnamed:
            self._unnamed.add(node_id)
        await self._quarantine(node_id, len(self._wardens.gpus(node_id)), look)
        if not got:
            return (
                f"{NOT_REPAIRED}: none of these GPUs could be taken out of use; somebody else has them by now"
            )
        return "in quarantine"

    async def _settle_quarantines(self, look: _Look) -> None:
        """Give back what no stray is on any more, and tell the core what is left of which node, where that changed."""
        told = {node.id: node.quarantined_units for node in self._view().nodes.values()}
        for node_id in {*self._wardens.nodes(), *(each for each, units in told.items() if units)}:
            if node_id not in look.probed:
                continue  # nothing is concluded from a driver that did not answer
            kept = self._wardens.gpus(node_id)
            used = {each.gpu for each in strays_among(look.probed[node_id], look.live)}
            if self._wardens.units(node_id) != len(kept & used) * GPU_UNIT:
                await self._wardens.release(node_id, keep=kept & used)
            strays = _strays_on(look, node_id, kept & used)
            news = _who(strays) != _who(self._strays.get(node_id, ()))
            if news or told.get(node_id) != len(kept & used) * GPU_UNIT:
                await self._quarantine(node_id, len(kept & used), look)

    async def _quarantine(self, node_id: str, gpus: int, look: _Look) -> None:
        """So many GPUs of the node are in quarantine from now on."""
        kept = self._wardens.gpus(node_id)
        strays = _strays_on(look, node_id, kept) if gpus else ()
        await self._request(GpusQuarantined(self._clock(), node_id, gpus * GPU_UNIT, strays))
        if gpus:
            self._strays[node_id] = strays
        else:
            self._strays.pop(node_id, None)


@dataclass(frozen=True, slots=True)
class _Look:
    """One look: both sides, their differences, what the nodes' drivers said, and what could not be read."""

    ledger: LedgerLook
    tables: RayLook
    found: list[Finding]
    probed: Mapping[str, tuple[GpuProcess, ...]]
    """What is on the GPUs, by node."""
    live: set[str]
    """The marks of the processes of live attempts."""
    unread: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """What was compared. `groups`: of ours, as seen on the nodes."""
        ours = {each.group_id for each in self.ledger.attempts.values()} | self.tables.groups.keys()
        held = {group_id for node in self.tables.nodes.values() for group_id in node.groups}
        return {
            "attempts": len(self.ledger.attempts),
            "groups": len(ours & held),
            "runners": len(self.tables.runners),
            "nodes": len(self.tables.nodes),
            "drivers": len(self.probed),
        }


async def _probe(node_id: str) -> DriverLook | str:
    try:
        answer: DriverLook | str = await _on(node_id, gpu_probe.read_gpus)
    except Exception as error:
        return f"the node did not answer ({type(error).__name__})"
    return answer


async def _on(node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns there. Raises what Ray raises, TimeoutError after PROBE_S."""
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(function).options(num_cpus=0, num_gpus=0, max_retries=0, scheduling_strategy=pinned)
    # The first one hands the task to the GCS, and waits for it.
    reading = await asyncio.to_thread(task.remote, *arguments)
    try:
        return await asyncio.wait_for(reading, PROBE_S)
    except BaseException:
        ray.cancel(reading, force=True)
        raise


def _strays_on(look: _Look, node_id: str, gpus: set[int]) -> tuple[Stray, ...]:
    """What was on these GPUs of the node, for people."""
    return tuple(
        Stray(each.gpu, each.pid, each.name, each.user, each.memory_bytes)
        for each in strays_among(look.probed.get(node_id, []), look.live)
        if each.gpu in gpus
    )


def _who(strays: Iterable[Stray]) -> set[tuple[int, int]]:
    """By GPU and pid: how much they hold changes all the time."""
    return {(each.gpu, each.pid) for each in strays}


def _names(nodes: list[str]) -> str:
    """Some of the names, and how many more there are."""
    more = len(nodes) - NAMED
    return ", ".join(sorted(nodes)[:NAMED]) + (f" and {more} more nodes" if more > 0 else "")


def _booked(node: Node) -> BookedNode:
    units = node.gpu_slots * GPU_UNIT
    return BookedNode(node.name, units, units - node.devices.total_free)


def _finding_view(finding: Finding, at: float, done: str | None, left: set[Any]) -> FindingView:
    repaired = done is not None and (finding.kind, finding.what) not in left
    return FindingView(
        at=at,
        kind=str(finding.kind),
        what=finding.what,
        message=finding.message,
        evidence=finding.evidence,
        repair=done or "reported only",
        repaired=repaired,
    )
