"""What to do next: one walk over the queue, as a value.

    schedule(state, now):
      1. take the room of every node: free, minus what strangers hold
      2. walk the queue in order (priority, then submission)
      3. a job in its back-off, or one that no present node could hold even if it were empty, is passed over
      4. a job that fits is admitted onto its places, which are taken from the room
      5. a job that does not fit keeps every node that it could use: nobody behind it may have those

Step 5 is strict order among jobs that compete for the same nodes: simple, starves nobody, and leaves GPUs idle
that a smaller job could use until the blocked one starts (backfill with a reservation replaces it). Jobs that
want other nodes (another GPU type) go on. The walk ends when no node is left. The plan is a list of events, in
order: the writer applies and commits them like any others. A second cycle at the same state and time plans
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rm.core import reasons
from rm.core.events import AvailabilityChecked, JobAdmitted
from rm.core.model import Gang, Job, PlacedBundle
from rm.core.placement import Room, feasible, matches, place, room
from rm.core.reasons import Reason
from rm.core.resources import Bundle, gpu_count
from rm.core.state import ClusterState


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions of one cycle: per job looked at a check, and an admission where it fits."""

    events: tuple[AvailabilityChecked | JobAdmitted, ...]


def schedule(state: ClusterState, now: float) -> Plan:
    """Decide who starts now. Reads `state`, changes nothing."""
    events: list[AvailabilityChecked | JobAdmitted] = []
    for step in _walk(state, now):
        job = step.job
        if step.places is not None:
            events.append(AvailabilityChecked(now, job.id, None))
            events.append(JobAdmitted(now, job.id, job.attempts + 1, step.places))
        elif job.reason is None or (step.blocked and job.reason.code != step.blocked.code):
            # Only where the answer has changed: the ledger keeps answers, not every asking.
            events.append(AvailabilityChecked(now, job.id, step.blocked))
    return Plan(tuple(events))


def why(state: ClusterState, job: Job, now: float) -> Reason:
    """The present reason of a queued job, with fresh evidence. For readers; the cycle doesn't need it."""
    keeper: Job | None = None
    for step in _walk(state, now):
        if step.job.id == job.id:
            return step.blocked or Reason(reasons.NOT_EVALUATED, "fits now; the next cycle will start it", {})
        if step.keeps:
            keeper = step.job
    if keeper is not None:
        return _behind(keeper)
    return Reason(reasons.NOT_EVALUATED, "no node was seen yet; it is looked at when one joins", {})


@dataclass(frozen=True, slots=True)
class _Step:
    """What the walk says of one job: its places, or why not. `keeps`: it now keeps the nodes that it waits for."""

    job: Job
    places: tuple[PlacedBundle, ...] | None = None
    blocked: Reason | None = None
    keeps: bool = False


def _walk(state: ClusterState, now: float) -> Iterator[_Step]:
    """Look at queued jobs in order, until every node is taken or kept."""
    rooms = {node.id: room(node) for node in state.nodes.values()}
    kept: dict[str, Job] = {}
    for *_, job_id in state.queue:
        if rooms and len(kept) == len(rooms):
            return
        job = state.jobs[job_id]
        passed = _passed_over(state, job, now)
        if passed is not None:
            yield _Step(job, blocked=passed)
            continue
        fitting = _matching(state, job.gang, rooms)
        open_rooms = {node_id: each for node_id, each in fitting.items() if node_id not in kept}
        places = place(job.gang, open_rooms)
        if places is not None:
            for placed in places:
                _, rooms[placed.node_id] = rooms[placed.node_id].take(job.gang)
            yield _Step(job, places)
            continue
        ahead = next((kept[node_id] for node_id in fitting if node_id in kept), None)
        blocked = _behind(ahead) if ahead is not None else _no_capacity(job.gang, fitting)
        keeps = [node_id for node_id in fitting if node_id not in kept]
        kept.update(dict.fromkeys(keeps, job))
        yield _Step(job, blocked=blocked, keeps=bool(keeps))


def _behind(ahead: Job) -> Reason:
    return Reason(
        reasons.PRIORITY,
        f"waits behind {ahead.id}, which needs {ahead.gang} and comes first",
        {"behind": ahead.id, "needs": str(ahead.gang)},
        "a job with a higher priority is looked at earlier",
    )


def _passed_over(state: ClusterState, job: Job, now: float) -> Reason | None:
    """Why the walk goes past this job without keeping anything for it, or None."""
    if job.eligible_at > now:
        wait_s = job.eligible_at - now
        last = f": {job.outcome.message}" if job.outcome and job.outcome.message else ""
        return Reason(
            reasons.HELD,
            f"its next attempt starts in {wait_s:.0f} s; the last one did not get far{last}",
            {"eligible_at": job.eligible_at, "infra_failures": job.infra_failures},
        )
    if feasible(job.gang, state.present_shapes()):
        return None
    most = max((node.gpu_slots for node in state.nodes.values()), default=0)
    evidence = {"needs": str(job.gang), "largest_node_gpus": most, "nodes": len(state.nodes)}
    if feasible(job.gang, state.node_shapes()):
        return Reason(
            reasons.WAITING_FOR_CAPACITY,
            f"needs {job.gang}; no node that is up could hold it, one that can be launched could",
            evidence,
            "it starts when such a node joins",
        )
    return Reason(
        reasons.INFEASIBLE,
        f"no node of this cluster could hold it now: it needs {job.gang}, the largest node has {most} GPUs",
        evidence,
        "it starts when a node that can hold it joins; cancel it if none will",
    )


def _matching(state: ClusterState, gang: Gang, rooms: dict[str, Room]) -> dict[str, Room]:
    if not gang.gpu_types and not gang.labels:
        return rooms
    return {key: each for key, each in rooms.items() if matches(gang, state.nodes[key].labels)}


def _no_capacity(gang: Gang, rooms: dict[str, Room]) -> Reason:
    free = sum(each.devices.total_free for each in rooms.values())
    largest = max((each.devices.total_free for each in rooms.values()), default=0)
    evidence = {
        "needed_gpus": gpu_count(gang.gpu_units),
        "free_gpus": gpu_count(free),
        "free_on_one_node": gpu_count(largest),
    }
    if place(replace(gang, bundle=Bundle(gang.bundle.gpu_units)), rooms) is not None:
        cpus = max((each.cpu_milli for each in rooms.values()), default=0) / 1000
        memory_gib = max((each.memory_bytes for each in rooms.values()), default=0) / 2**30
        return Reason(
            reasons.WAITING_FOR_CAPACITY,
            f"{_gpus(gang.gpu_units)} are free for it, but not its CPUs and memory beside them: "
            f"the most on one node are {cpus:g} CPUs and {memory_gib:.1f} GiB",
            {**evidence, "cpus_on_one_node": cpus, "memory_gib_on_one_node": round(memory_gib, 1)},
            "a lower cpus_per_gpu or memory_per_gpu could start sooner",
        )
    if free >= gang.gpu_units:
        return Reason(
            reasons.FRAGMENTED,
            f"{_gpus(free)} are free, but not as {gang}: the most on one node are {gpu_count(largest):g}",
            evidence,
            "smaller bundles (more nodes with fewer GPUs each) could start sooner",
        )
    return Reason(
        reasons.WAITING_FOR_CAPACITY,
        f"needs {_gpus(gang.gpu_units)}, {gpu_count(free):g} are free",
        evidence,
        "it starts as soon as running jobs release enough",
    )


def _gpus(units: int) -> str:
    count = gpu_count(units)
    return "1 GPU" if count == 1 else f"{count:g} GPUs"
