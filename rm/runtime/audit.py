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
    Finding,
    GpuProcess,
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
    gpus_in_use,
)
from rm.core.events import Event, RunLost
from rm.core.model import Job, Kind, Node, attempt_key
from rm.core.resources import GPU_UNIT
from rm.runtime import gpu_probe
from rm.runtime.gangs import Gangs
from rm.runtime.nodes import read_nodes
from rm.runtime.orders import process_mark
from rm.runtime.placements import Placements
from rm.runtime.runners import Runners
from rm.runtime.stands import Stands
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
        self._kept: deque[FindingView] = deque(maxlen=FINDINGS_KEPT)
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
            findings = tuple(await self._repair(found))
            for each in findings:
                log.warning("%s; %s", each.message, each.repair)
            self._kept.extend(findings)
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
        mine = {
            process_mark(self._ledger_key, each.key, bundle)
            for each in ledger.attempts.values()
            for bundle in range(len(each.placed))
        }
        probed, unread = await self._read_gpus(tables.nodes)
        for node_id, processes in probed.items():
            found += gpus_in_use(tables.nodes[node_id], processes, mine)
        return _Look(ledger, tables, found, len(probed), tuple(unread))

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
        name of its present attempt here; stands that nobody has at present are left out, they have an end of their own.
        """
        unused = self._stands.unused()
        idle = self._stands.unused_groups()
        nodes = {
            node.id: RayNode(
                node.name,
                node.gpu_units,
                node.free_gpu_units,
                {group_id: amounts[0] for group_id, amounts in node.groups.items() if group_id not in idle},
            )
            for node in read_nodes().nodes.values()
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
        return RayLook(nodes, groups, frozenset(runners))

    async def _read_gpus(self, nodes: Mapping[str, RayNode]) -> tuple[dict[str, list[GpuProcess]], list[str]]:
        """What the drivers say on nodes with free GPUs: a task that needs nothing, pinned to each."""
        self._blind = {node_id: why for node_id, why in self._blind.items() if node_id in nodes}
        free = [
            each for each, node in nodes.items() if node.free_units >= GPU_UNIT and each not in self._blind
        ]
        answers = await asyncio.gather(*(_probe(node_id) for node_id in free))
        probed: dict[str, list[GpuProcess]] = {}
        passing: dict[str, str] = {}
        for node_id, answer in zip(free, answers, strict=True):
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

    async def _repair(self, found: Iterable[Finding]) -> list[FindingView]:
        """Carry out every repair, then look until they show. Returns the findings as readers get them."""
        at, done = self._clock(), {}
        for each in found:
            if each.repair is None:
                continue
            try:
                done[each.kind, each.what] = await self._carry_out(each.repair)
            except Exception as error:
                log.warning("the repair of %s failed", each.what, exc_info=True)
                done[each.kind, each.what] = f"could not be repaired: {error}"
        left = set(done)
        deadline = time.monotonic() + REPAIRED_S
        while left and time.monotonic() < deadline:
            _, _, again = await self._compare()
            left &= {(each.kind, each.what) for each in again}
            if left:
                await asyncio.sleep(LOOK_AGAIN_S)
        return [_finding_view(each, at, done.get((each.kind, each.what)), left) for each in found]

    async def _carry_out(self, repair: RemoveGroup | KillRunner | LoseAttempt) -> str:
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


@dataclass(frozen=True, slots=True)
class _Look:
    """One look: both sides, their differences, how many nodes' drivers were read, and what could not be."""

    ledger: LedgerLook
    tables: RayLook
    found: list[Finding]
    probed: int
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
            "drivers": self.probed,
        }


async def _probe(node_id: str) -> list[GpuProcess] | str:
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(gpu_probe.read_gpus).options(
        num_cpus=0, num_gpus=0, max_retries=0, scheduling_strategy=pinned
    )
    reading = task.remote()
    try:
        answer: list[GpuProcess] | str = await asyncio.wait_for(reading, PROBE_S)
    except Exception as error:
        ray.cancel(reading, force=True)
        return f"the node did not answer ({type(error).__name__})"
    return answer


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
