"""Whether the ledger, Ray's tables and the GPUs' driver say the same. Pure: looks at the world in, findings out.

Everything moves while one looks. So the ledger is read before and after Ray: an attempt is *settled* if both readings
have it in the same phase and nothing of it is under way, and only settled attempts are held to what Ray says. What
Ray has and no attempt owns must be owned in neither reading. And a finding counts only if a second look, some seconds
later, makes it again (`confirmed`).

Amounts are GPU units (`GPU_UNIT`), memory is bytes. Groups are those of one ledger, by attempt key ("j17.1").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from rm.core.gpu_errors import GpuCondition
from rm.core.model import Phase, PlacedBundle, attempt_key, units_by_node
from rm.core.resources import GPU_UNIT, gpu_count

STRAY_BYTES = 500 * 2**20
"""What one process must hold of a GPU to be worth a finding: a bare CUDA context takes up to so much."""


class Fault(StrEnum):
    """The kinds of findings. `docs/reliability.md` explains each."""

    ORPHAN_GROUP = "orphan_group"
    LOST_GROUP = "lost_group"
    MOVED_GROUP = "moved_group"
    ORPHAN_RUNNER = "orphan_runner"
    DEAD_RUNNER = "dead_runner"
    CHARGES = "charges"
    NODE = "node"
    GPU_IN_USE = "gpu_in_use"
    LEFT_BEHIND = "left_behind"
    GPU_ERRORS = "gpu_errors"


@dataclass(frozen=True, slots=True)
class RemoveGroup:
    """With it Ray ends all actors in it."""

    group_id: str


@dataclass(frozen=True, slots=True)
class KillRunner:
    """`name`: attempt and bundle, "j17.1/0"."""

    name: str


@dataclass(frozen=True, slots=True)
class LoseAttempt:
    """The attempt can't go on: it ends as lost to the infrastructure."""

    job_id: str
    attempt: int
    why: str


@dataclass(frozen=True, slots=True)
class EndProcesses:
    """Those on the node that bear the mark of an attempt which has ended."""

    node_id: str
    mark: str


@dataclass(frozen=True, slots=True)
class KeepFromUse:
    """Those of the node's `gpus` that Ray counts free: they are given to nobody while the strays are there."""

    node_id: str
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CondemnNode:
    """Nothing new should start there: `why` is what the driver says."""

    node_id: str
    why: str


Repair = RemoveGroup | KillRunner | LoseAttempt | EndProcesses | KeepFromUse | CondemnNode | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference. `what` names the thing, `message` says it to people. `repair` None: only reported."""

    kind: Fault
    what: str
    message: str
    evidence: dict[str, Any]
    repair: Repair = None


# --- what is compared ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LiveAttempt:
    """One live attempt by the ledger. `bundle_units`: of each of its bundles.

    `has_runners`: False for a lease. `followed`: its run is being followed, and neither stopping nor reported as ended.
    """

    job_id: str
    number: int
    phase: Phase
    placed: tuple[PlacedBundle, ...]
    bundle_units: int
    group_id: str | None
    has_runners: bool = True
    followed: bool = True

    @property
    def key(self) -> str:
        return attempt_key(self.job_id, self.number)

    def planned(self) -> Counter[str]:
        """Units by node."""
        return units_by_node(self.placed, self.bundle_units)


@dataclass(frozen=True, slots=True)
class BookedNode:
    """One node by the ledger. `charged_units`: what live attempts hold there."""

    name: str
    gpu_units: int
    charged_units: int


@dataclass(frozen=True, slots=True)
class LedgerLook:
    """The committed state: attempts by key, nodes by id."""

    attempts: Mapping[str, LiveAttempt] = field(default_factory=dict)
    nodes: Mapping[str, BookedNode] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RayNode:
    """One alive node by Ray. `groups`: units of the groups, ours and others', that are committed there, by id."""

    name: str
    gpu_units: int
    free_units: int
    groups: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RayGroup:
    """A group of this ledger by Ray's table. `state` is Ray's word, `bundle_nodes` node ids ("" where it has none)."""

    attempt: str
    state: str
    bundle_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RayLook:
    """Ray's tables. `groups` has those of ours that were looked up, by id; `runners` the names, as "j17.1/0"."""

    nodes: Mapping[str, RayNode] = field(default_factory=dict)
    groups: Mapping[str, RayGroup] = field(default_factory=dict)
    runners: frozenset[str] = frozenset()
    unheard: frozenset[str] = frozenset()
    """Live nodes that have not said what they hold since the GCS was restarted: not in `nodes`, and not gone."""

    def held(self, group_id: str) -> Counter[str]:
        """Units by node that the group holds."""
        return Counter(
            {
                node_id: node.groups[group_id]
                for node_id, node in self.nodes.items()
                if group_id in node.groups
            }
        )


# --- the ledger against Ray ----------------------------------------------------------------------------------


def differences(before: LedgerLook, ray: RayLook, after: LedgerLook) -> list[Finding]:
    """Every difference that one look shows."""
    settled = [
        attempt
        for key, attempt in after.attempts.items()
        if before.attempts.get(key) == attempt
        and attempt.phase in (Phase.STARTING, Phase.RUNNING)
        and attempt.followed
    ]
    lost = {each.key: finding for each in settled if (finding := _lost(each, ray)) is not None}
    whole = [each for each in settled if each.key not in lost]
    owned = _owned(before, after)
    return [
        *lost.values(),
        *_orphan_runners(owned, ray),
        *_orphan_groups(owned, ray),
        *_charges(whole, ray, after),
        *_nodes(before, ray, after),
    ]


def doubtful(ledger: LedgerLook, nodes: Mapping[str, RayNode]) -> set[str]:
    """Ids of the groups that Ray's table must be asked about: nobody's, and those that do not hold what is planned."""
    ray = RayLook(nodes)
    known = {each.group_id: each for each in ledger.attempts.values() if each.group_id}
    unknown = {group_id for node in nodes.values() for group_id in node.groups} - known.keys()
    return unknown | {group_id for group_id, each in known.items() if ray.held(group_id) != each.planned()}


def confirmed(first: Iterable[Finding], second: Iterable[Finding]) -> list[Finding]:
    """Those of the second look that the first made too. Charges must differ by the same amount in both."""
    seen = {_identity(each) for each in first}
    return [each for each in second if _identity(each) in seen]


def _identity(finding: Finding) -> tuple[Fault, str, str]:
    return finding.kind, finding.what, finding.message if finding.kind is Fault.CHARGES else ""


def _lost(attempt: LiveAttempt, ray: RayLook) -> Finding | None:
    """Why a settled attempt can't go on, or None."""
    key = attempt.key
    group = ray.groups.get(attempt.group_id or "")

    def finding(kind: Fault, why: str, **evidence: Any) -> Finding:
        repair = LoseAttempt(attempt.job_id, attempt.number, why)
        return Finding(kind, key, f"{key}: {why}", {"group_id": attempt.group_id, **evidence}, repair)

    if ray.held(attempt.group_id or "") != attempt.planned():
        state = group.state if group else "none"
        if state in ("none", "REMOVED"):
            return finding(Fault.LOST_GROUP, "its placement group was removed by somebody else", state=state)
        planned = sorted(each.node_id for each in attempt.placed)
        if group is not None and sorted(group.bundle_nodes) != planned:
            why = "its placement group is not on the nodes that were planned"
            nodes = list(group.bundle_nodes)
            return finding(Fault.MOVED_GROUP, why, state=state, planned=planned, nodes=nodes)
    if attempt.phase is Phase.RUNNING and attempt.has_runners:
        dead = [bundle for bundle in range(len(attempt.placed)) if f"{key}/{bundle}" not in ray.runners]
        if dead:
            words = ", ".join(map(str, dead))
            return finding(Fault.DEAD_RUNNER, f"the runner of bundle {words} is gone", bundles=dead)
    return None


def _owned(before: LedgerLook, after: LedgerLook) -> dict[str, set[str | None]]:
    """The attempts of either reading, each with the ids that its group may have. None: not known yet."""
    owned: dict[str, set[str | None]] = {}
    for look in (before, after):
        for key, attempt in look.attempts.items():
            owned.setdefault(key, set()).add(attempt.group_id)
    return owned


def _orphan_groups(owned: Mapping[str, set[str | None]], ray: RayLook) -> list[Finding]:
    findings = []
    for group_id, group in ray.groups.items():
        held = ray.held(group_id)
        ids = owned.get(group.attempt, set())
        if not held or group_id in ids or None in ids:
            continue
        # Ray can call a group removed whose resources a node never gave back: then nothing but the node's end helps.
        message = f"placement group {group.attempt}, {group.state} in Ray's table, belongs to no live attempt"
        evidence = {
            "group_id": group_id,
            "state": group.state,
            "gpus": {ray.nodes[node_id].name: gpu_count(units) for node_id, units in held.items()},
        }
        repair = RemoveGroup(group_id)
        findings.append(Finding(Fault.ORPHAN_GROUP, f"{group.attempt} {group_id}", message, evidence, repair))
    return findings


def _orphan_runners(owned: Mapping[str, set[str | None]], ray: RayLook) -> list[Finding]:
    return [
        Finding(
            Fault.ORPHAN_RUNNER,
            name,
            f"runner {name} belongs to no live attempt",
            {"name": name},
            KillRunner(name),
        )
        for name in sorted(ray.runners)
        if name.rpartition("/")[0] not in owned
    ]


def _charges(whole: Iterable[LiveAttempt], ray: RayLook, after: LedgerLook) -> list[Finding]:
    """Nodes on which the books charge something else for the settled attempts than their groups hold."""
    held: Counter[str] = Counter()
    moving = dict(after.attempts)
    for attempt in whole:
        held += ray.held(attempt.group_id or "")
        del moving[attempt.key]
    charged = Counter({node_id: node.charged_units for node_id, node in after.nodes.items()})
    for attempt in moving.values():
        charged.subtract({node_id: n for node_id, n in attempt.planned().items() if node_id in after.nodes})
    findings = []
    for node_id in after.nodes.keys() & ray.nodes.keys():
        if charged[node_id] != held[node_id]:
            ours, rays = gpu_count(charged[node_id]), gpu_count(held[node_id])
            name = after.nodes[node_id].name
            message = f"node {name}: the ledger charges {ours:g} GPUs where our groups hold {rays:g}"
            evidence = {"node_id": node_id, "charged_gpus": ours, "held_gpus": rays}
            findings.append(Finding(Fault.CHARGES, name, message, evidence))
    return findings


def _nodes(before: LedgerLook, ray: RayLook, after: LedgerLook) -> list[Finding]:
    """Nodes that only one side knows, or knows with other GPUs."""
    findings = []
    for node_id in (ray.nodes.keys() | (before.nodes.keys() & after.nodes.keys())) - ray.unheard:
        real = ray.nodes.get(node_id)
        readings = [look.nodes[node_id] for look in (before, after) if node_id in look.nodes]
        ours = [gpu_count(each.gpu_units) for each in readings]
        rays = gpu_count(real.gpu_units // GPU_UNIT * GPU_UNIT) if real else None
        if rays in ours or (rays is None and not ours):
            continue
        name = real.name if real else readings[0].name
        says = f"has {ours[-1]:g} GPUs by the ledger" if ours else "is unknown to the ledger"
        message = f"node {name} {says} and " + (f"{rays:g} by Ray" if real else "is gone by Ray")
        evidence = {"node_id": node_id, "ledger_gpus": ours[-1] if ours else None, "ray_gpus": rays}
        findings.append(Finding(Fault.NODE, f"{name} {node_id[:8]}", message, evidence))
    return findings


# --- Ray against the driver ----------------------------------------------------------------------------------

RAY = "ray"
"""`GpuProcess.owner` of what descends from the node's raylet and bears no attempt's mark."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """One process that holds memory of one GPU. `owner`: the mark of its attempt, RAY, or "" for a stranger's.

    `user`: whose it is on the node, "" where that can't be told.
    """

    gpu: int
    pid: int
    name: str
    memory_bytes: int
    owner: str
    user: str = ""

    def __str__(self) -> str:
        """ "process 4711 (python) of ada"."""
        return f"process {self.pid} ({self.name})" + (f" of {self.user}" if self.user else "")


@dataclass(frozen=True, slots=True)
class DriverLook:
    """What the driver of one node says: what is on its GPUs, and how each of them is."""

    processes: tuple[GpuProcess, ...] = ()
    conditions: tuple[GpuCondition, ...] = ()


def gpu_errors(node_id: str, node: RayNode, conditions: Iterable[GpuCondition]) -> list[Finding]:
    """The node, if there are GPUs on it that can't go on: one finding for all of them."""
    broken = [(each, trouble) for each in conditions if (trouble := each.trouble())]
    if not broken:
        return []
    why = "; ".join(trouble for _, trouble in broken)
    evidence = {"node": node.name, "gpus": [each.gpu for each, _ in broken]}
    message = f"node {node.name}: {why}"
    return [Finding(Fault.GPU_ERRORS, node.name, message, evidence, CondemnNode(node_id, why))]


def left_behind(
    node_id: str, node: RayNode, processes: Iterable[GpuProcess], live: set[str], ledger_key: str
) -> list[Finding]:
    """Processes on the node's GPUs that attempts of this ledger left when they ended. `live`: marks of the others."""
    return [
        Finding(
            Fault.LEFT_BEHIND,
            f"{node.name} pid {each.pid}",
            f"GPU {each.gpu} of {node.name}: {each} holds {each.memory_bytes >> 20} MiB, "
            f"and its attempt has ended ({each.owner})",
            _evidence(node, each),
            EndProcesses(node_id, each.owner),
        )
        for each in processes
        if each.owner.startswith(f"{ledger_key}-") and each.owner not in live
    ]


def gpus_in_use(
    node_id: str, node: RayNode, processes: Iterable[GpuProcess], live: set[str]
) -> list[Finding]:
    """Strays that hold much memory of GPUs which Ray counts free. `live`: the marks of the live attempts.

    `node`, `processes`: without the GPUs that are kept from use already.
    Which devices Ray counts free nobody tells, only how many. So devices on which only strays have memory are first
    taken for those that Ray has given away and that have nothing on them yet; there is a finding if too many remain.
    """
    processes = list(processes)
    working = {each.gpu for each in processes if each.owner == RAY or each.owner in live}
    strays = [each for each in strays_among(processes, live) if each.gpu not in working]
    devices = sorted({each.gpu for each in strays})
    certain = len(devices) - max(0, _devices_taken(node) - len(working))
    if certain <= 0:
        return []
    free = gpu_count(node.free_units)
    which = "" if certain == len(devices) else f", at least {certain} of GPUs {', '.join(map(str, devices))}"
    return [
        _in_use(node_id, node, each, f"Ray counts {free:g} GPUs there free{which}", tuple(devices))
        for each in strays
    ]


def still_in_use(
    node_id: str, node: RayNode, processes: Iterable[GpuProcess], live: set[str], kept: Iterable[int]
) -> list[Finding]:
    """Strays on those GPUs of the node that are kept from use."""
    devices = set(kept)
    return [
        _in_use(node_id, node, each, "it is given to nobody until that is over", (each.gpu,))
        for each in strays_among(processes, live)
        if each.gpu in devices
    ]


def strays_among(processes: Iterable[GpuProcess], live: set[str]) -> list[GpuProcess]:
    """Those that hold much, and are neither Ray's nor a live attempt's."""
    return [
        each
        for each in processes
        if each.owner != RAY and each.owner not in live and each.memory_bytes >= STRAY_BYTES
    ]


def without_kept(node: RayNode, kept: int) -> RayNode:
    """The node without so many GPUs, which Ray has given to us so that nobody else gets them."""
    return replace(node, gpu_units=node.gpu_units - kept * GPU_UNIT)


def _in_use(node_id: str, node: RayNode, stray: GpuProcess, so_what: str, gpus: tuple[int, ...]) -> Finding:
    return Finding(
        Fault.GPU_IN_USE,
        f"{node.name} GPU {stray.gpu} pid {stray.pid}",
        f"GPU {stray.gpu} of {node.name}: {stray} holds {stray.memory_bytes >> 20} MiB, and {so_what}",
        _evidence(node, stray),
        KeepFromUse(node_id, gpus),
    )


def _evidence(node: RayNode, stray: GpuProcess) -> dict[str, Any]:
    return {
        "node": node.name,
        "gpu": stray.gpu,
        "pid": stray.pid,
        "name": stray.name,
        "user": stray.user,
        "memory_bytes": stray.memory_bytes,
        "left_by": stray.owner,
    }


def _devices_taken(node: RayNode) -> int:
    """At most so many devices Ray may have given away: a share of one can lie on any of them."""
    others = node.gpu_units - node.free_units - sum(node.groups.values())
    return sum(
        -(-units // GPU_UNIT) + (units % GPU_UNIT > 0) for units in (*node.groups.values(), max(0, others))
    )
