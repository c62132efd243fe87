"""What to do next: one pass over the queue, as a value.

    schedule(state, now):
      1. take the room of every node: free, minus what strangers hold
      2. walk the queue in order (priority, then submission)
      3. a job in its back-off, or one that no node could hold even if it were empty, is passed over
      4. a job that fits is admitted onto its places, which are taken from the room
      5. the first job that does not fit stops the walk: nobody overtakes it

Step 5 is strict order: simple, starves nobody, and leaves GPUs idle that a smaller job could use until the
blocked one starts (backfill with a reservation replaces it). The plan is a list of events, in order: the
writer applies and commits them like any others. A second cycle at the same state and time plans nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from rm.core import reasons
from rm.core.events import AvailabilityChecked, JobAdmitted
from rm.core.model import Gang, Job
from rm.core.placement import Room, feasible, matches, place, room
from rm.core.reasons import Reason
from rm.core.resources import gpu_count
from rm.core.state import ClusterState


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions of one cycle: per job looked at a check, and an admission where it fits."""

    events: tuple[AvailabilityChecked | JobAdmitted, ...]


def schedule(state: ClusterState, now: float) -> Plan:
    """Decide who starts now. Reads `state`, changes nothing."""
    rooms = {node.id: room(node) for node in state.nodes.values()}
    events: list[AvailabilityChecked | JobAdmitted] = []
    for *_, job_id in state.queue:
        job = state.jobs[job_id]
        blocked = _passed_over(state, job, now)
        if blocked is None:
            fitting = _matching(state, job.gang, rooms)
            places = place(job.gang, fitting)
            if places is not None:
                # The check stands in the ledger once: again only where a cycle had said "no" before.
                events.append(AvailabilityChecked(now, job.id, None))
                events.append(JobAdmitted(now, job.id, job.attempts + 1, places))
                for placed in places:
                    _, rooms[placed.node_id] = rooms[placed.node_id].take(job.gang)
                continue
            blocked = _no_capacity(job.gang, fitting)
        if job.reason is None or job.reason.code != blocked.code:
            events.append(AvailabilityChecked(now, job.id, blocked))
        if blocked.code in (reasons.WAITING_FOR_CAPACITY, reasons.FRAGMENTED):
            break
    return Plan(tuple(events))


def why(state: ClusterState, job: Job, now: float) -> Reason:
    """The present reason of a queued job, with fresh evidence. For readers; the cycle doesn't need it."""
    blocked = _passed_over(state, job, now)
    if blocked is not None:
        return blocked
    for position, (*_, job_id) in enumerate(state.queue):
        ahead = state.jobs[job_id]
        if job_id == job.id:
            break
        if _passed_over(state, ahead, now) is None:
            return Reason(
                reasons.PRIORITY,
                f"waits behind {ahead.id}, which needs {ahead.gang} and comes first",
                {"behind": ahead.id, "position": position + 1, "needs": str(ahead.gang)},
                "a higher priority would move it forward",
            )
    rooms = {node.id: room(node) for node in state.nodes.values()}
    fitting = _matching(state, job.gang, rooms)
    if place(job.gang, fitting) is not None:
        return Reason(reasons.NOT_EVALUATED, "fits now; the next cycle will start it", {"bound": "cycle"})
    return _no_capacity(job.gang, fitting)


def _passed_over(state: ClusterState, job: Job, now: float) -> Reason | None:
    """Why the walk goes past this job without stopping at it, or None."""
    if job.eligible_at > now:
        wait_s = job.eligible_at - now
        return Reason(
            reasons.HELD,
            f"its last attempt was lost; the next one starts in {wait_s:.0f} s",
            {"eligible_at": job.eligible_at, "infra_failures": job.infra_failures},
        )
    if not feasible(job.gang, state.node_shapes()):
        most = max((node.gpu_slots for node in state.nodes.values()), default=0)
        return Reason(
            reasons.INFEASIBLE,
            f"no node of this cluster could hold it now: it needs {job.gang}, the largest node has {most} GPUs",
            {"needs": str(job.gang), "largest_node_gpus": most, "nodes": len(state.nodes)},
            "it starts when a node that can hold it joins; cancel it if none will",
        )
    return None


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
    if free >= gang.gpu_units:
        return Reason(
            reasons.FRAGMENTED,
            f"{gpu_count(free):g} GPUs are free, but not as {gang}: "
            f"the most on one node are {gpu_count(largest):g}",
            evidence,
            "smaller bundles (more nodes with fewer GPUs each) could start sooner",
        )
    return Reason(
        reasons.WAITING_FOR_CAPACITY,
        f"needs {gpu_count(gang.gpu_units):g} GPUs, {gpu_count(free):g} are free",
        evidence,
        "it starts as soon as running jobs release enough",
    )
