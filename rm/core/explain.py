"""Why a job waits: the first rule that matches, with the numbers behind it and what the user could change.

Asked of a cycle's trial after its walk, so the answer is about this very moment: what was kept for others, and for
whom, is known. `docs/reasons/` has a page for each code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from rm.core import reasons
from rm.core.capacity import NodeClass, matches, usable
from rm.core.launches import LaunchFailure
from rm.core.model import Gang, Job
from rm.core.options import Option
from rm.core.placement import feasible, place
from rm.core.preemption import has_a_right
from rm.core.reasons import Reason
from rm.core.reservations import Reservation, class_ids, end_if_started
from rm.core.resources import GPU_UNIT, NOTHING, Bundle, gpu_count, gpus_in_words

if TYPE_CHECKING:
    from rm.core.cycle import Cycle


def reason_of(cycle: Cycle, job: Job) -> Reason:
    """The reason of a queued job. First match wins."""
    reservation = cycle.kept.reservations.get(job.id)
    if reservation is None:
        return _reason_of(cycle, job)
    # What is kept for the job itself is free as far as its own numbers go.
    capacity = cycle.state.capacity
    mark = capacity.mark()
    try:
        for node_id, need in reservation.need.items():
            held = cycle.kept.holds.get(node_id, NOTHING)
            alone = sum(node_id in each.need for each in cycle.kept.reservations.values()) == 1
            capacity.keep_free(node_id, -(held if alone else held.at_most(need)))
        return _promised(cycle, job, _reason_of(cycle, job), reservation)
    finally:
        capacity.rollback(mark)


def _promised(cycle: Cycle, job: Job, reason: Reason, reservation: Reservation) -> Reason:
    """With what the job was promised: a date where one lies ahead, and the GPU type where it had a choice."""
    evidence, advice = dict(reason.evidence), reason.advice
    options = cycle.notes.options.of(job.queue, job.gang)
    mine = next((each for each in options if class_ids(each.classes) == reservation.classes), None)
    gpu_type = mine.gpu_type if mine is not None and len(options) > 1 else None
    if gpu_type is not None:
        evidence["gpu_type"] = gpu_type
    if cycle.now < reservation.at < inf and not reservation.boots:
        evidence["at"] = reservation.at
        on_type = "" if gpu_type is None else f" on {gpu_type}"
        wait_s = reservation.at - cycle.now
        advice = f"it starts in {wait_s:.0f} s at the latest{on_type}, by the time limits of others"
    elif gpu_type is not None:
        advice = f"{advice}; {gpu_type} is kept for it"
    return replace(reason, evidence=evidence, advice=advice)


def _reason_of(cycle: Cycle, job: Job) -> Reason:
    if job.id in cycle.admitted:
        return Reason(reasons.NOT_EVALUATED, "fits now; the next cycle will start it")
    found = _must_not_start(cycle, job) or _booting(cycle, job) or _cannot_ever(cycle, job)
    if found is not None:
        return found
    options = cycle.notes.options.of(job.queue, job.gang)
    return (
        _quota(cycle, job, options)
        or _coming(cycle, job)
        or _launch_failed(cycle, job)
        or _cut_off(cycle, job, options)
        or _kept_for_others(cycle, job, options)
        or _fragmented(cycle, job, options)
        or _behind(cycle, job, options)
        or _no_capacity(cycle, job, options)
    )


def _must_not_start(cycle: Cycle, job: Job) -> Reason | None:
    if job.held:
        by = f" by {job.held_by}" if job.held_by else ""
        return Reason(reasons.HELD, f"held back{by}", {"by": job.held_by}, "`rmctl release` lets it go")
    if job.eligible_at > cycle.now:
        wait_s = job.eligible_at - cycle.now
        last = f": {job.outcome.message}" if job.outcome and job.outcome.message else ""
        return Reason(
            reasons.HELD,
            f"its next attempt starts in {wait_s:.0f} s; the last one did not get far{last}",
            {"eligible_at": job.eligible_at, "infra_failures": job.infra_failures},
        )
    if job.after:
        names = ", ".join(job.after[:5]) + (" …" if len(job.after) > 5 else "")
        return Reason(
            reasons.DEPENDENCY, f"waits for {names} to succeed", {"after": list(job.after)}, "they come first"
        )
    if not cycle.open(job.queue):
        gone = job.queue not in cycle.state.policy.queues
        return Reason(
            reasons.QUEUE_STOPPED,
            f"queue {job.queue} {'is no longer configured' if gone else 'is stopped'}",
            {"queue": job.queue},
            "an administrator can start it again with `rmctl apply`; or submit to another queue",
        )
    return None


def _cannot_ever(cycle: Cycle, job: Job) -> Reason | None:
    state, gang = cycle.state, cycle.wanted(job)
    if state.launches.awaited and not (len(state.capacity) and cycle.feasible(job)):
        return Reason(
            reasons.NOT_EVALUATED,
            f"needs {job.gang}; no node that is up could hold it, and what can be launched is not known yet",
            {"needs": str(job.gang), "node_types": "awaited"},
            "the autoscaler's node types are read as soon as they can be; `rmctl scale` lists them then",
        )
    if not len(state.capacity):
        return Reason(reasons.NOT_EVALUATED, "no node was seen yet; it is looked at when one joins")
    if cycle.feasible(job):
        return _exceeds_quota(cycle, job)
    present, all_shapes = state.present_shapes(), state.node_shapes()
    most = max((shape.gpu_slots for shape in present), default=0)
    evidence = {"needs": str(job.gang), "largest_node_gpus": most, "nodes": len(state.nodes)}
    if feasible(gang, present):
        cordoned, units = _cordoned(state.capacity.matching(gang))
        return Reason(
            reasons.NODES_CORDONED,
            f"needs {job.gang}; what is not cordoned could not hold it: {_nodes_are_cordoned(cordoned, units)}",
            {**evidence, "cordoned_nodes": cordoned, "cordoned_gpus": gpu_count(units)},
            "it starts when they are uncordoned; `rmctl nodes` says by whom they are cordoned, and why",
        )
    if feasible(gang, all_shapes):
        return _launch_failed(cycle, job) or Reason(
            reasons.WAITING_FOR_CAPACITY,
            f"needs {job.gang}; no node that is up could hold it, one that can be launched could",
            evidence,
            "it starts when such a node joins",
        )
    if not state.capacity.matching(gang):
        wanted = " or ".join(gang.gpu_types) or ", ".join(f"{key}={value}" for key, value in gang.labels)
        have = sorted({shape.gpu_type for shape in all_shapes if shape.gpu_type})
        return Reason(
            reasons.NO_MATCHING_GPU_TYPE,
            f"no node of this cluster is {wanted or 'one with GPUs'}",
            {**evidence, "wanted": wanted, "gpu_types": have},
            f"the cluster has {', '.join(have)}" if have else "its nodes carry no GPU type",
        )
    return Reason(
        reasons.INFEASIBLE,
        f"no node of this cluster could hold it now: it needs {job.gang}, the largest node has {most} GPUs",
        evidence,
        "it starts when a node that can hold it joins; cancel it if none will",
    )


def _booting(cycle: Cycle, job: Job) -> Reason | None:
    """Nodes are asked for it."""
    launches, policy = cycle.state.launches, cycle.state.policy
    want = launches.wanted.wants.get(job.id)
    if want is None:
        return None
    counts = {name: want.node_types.count(name) for name in want.node_types}
    booting = {name: launches.booting[name] for name in counts if launches.booting.get(name)}
    nodes = " and ".join(
        f"{count} node{'' if count == 1 else 's'} of type {name}" for name, count in counts.items()
    )
    boot_s = max(launches.boot_s(name, policy) for name in counts)
    state = "booting for it" if booting else "asked for"
    failed = _failures(cycle, job)
    instead = "".join(f"; {name} failed before ({each.message})" for name, each in failed)
    return Reason(
        reasons.NODE_BOOTING,
        f"{nodes} {'is' if len(want.node_types) == 1 else 'are'} {state}{instead}",
        {
            "node_types": counts,
            "gpu_type": want.gpu_type,
            "booting": booting,
            "boot_s": boot_s,
            "failed": {name: each.message for name, each in failed},
        },
        f"it starts when what it needs has joined; a boot takes about {boot_s / 60:.0f} min",
    )


def _launch_failed(cycle: Cycle, job: Job) -> Reason | None:
    """A node type that could hold the job is in a pause, since nobody could get a node of it."""
    failed = _failures(cycle, job)
    if not failed or job.id in cycle.kept.reservations:
        return None
    name, failure = max(failed, key=lambda each: each[1].at)
    wait_s = min(each.until for _, each in failed) - cycle.now
    return Reason(
        reasons.LAUNCH_FAILED,
        f"a node of type {name} could not be had: {failure.message}",
        {
            "failed": {each: one.message for each, one in failed},
            "in_a_row": failure.in_a_row,
            "again_at": min(each.until for _, each in failed),
        },
        f"it is tried again in {wait_s:.0f} s; another gpu_type, or a list of them, could start sooner",
    )


def _failures(cycle: Cycle, job: Job) -> list[tuple[str, LaunchFailure]]:
    launches, gang = cycle.state.launches, cycle.wanted(job)
    return [
        (name, failure)
        for name, failure in launches.failures.items()
        if cycle.now < failure.until
        and name in launches.types
        and launches.types[name].gpu_slots * GPU_UNIT >= gang.bundle.gpu_units
        and matches(gang, launches.types[name].labels)
    ]


def _exceeds_quota(cycle: Cycle, job: Job) -> Reason | None:
    quota, units = cycle.state.books.quota, job.gang.least_units
    options = cycle.notes.options.of(job.queue, job.gang)
    most = max((quota.most(job.queue, option.kind) for option in options), default=0)
    rules = cycle.state.policy.queues.get(job.queue)
    if rules is not None and rules.max_gpus_per_owner is not None and rules.max_gpus_per_owner < units:
        limit = gpu_count(rules.max_gpus_per_owner)
        return Reason(
            reasons.EXCEEDS_QUOTA,
            f"needs {gpus_in_words(units)}; in queue {job.queue} one owner may never hold more than {limit:g}",
            {"needed_gpus": gpu_count(units), "owner_limit_gpus": limit, "queue": job.queue},
            "ask for fewer GPUs, or use a queue with a larger limit",
        )
    if most >= units:
        return None
    return Reason(
        reasons.EXCEEDS_QUOTA,
        f"needs {gpus_in_words(units)}; queue {job.queue} may never hold more than {gpus_in_words(most)}",
        {"needed_gpus": gpu_count(units), "most_gpus": gpu_count(most), "queue": job.queue},
        "ask for fewer GPUs, or use a queue with a larger quota",
    )


def _quota(cycle: Cycle, job: Job, options: Sequence[Option]) -> Reason | None:
    if (
        any(cycle.within_quota(job, option) is not None for option in options)
        or job.id in cycle.kept.reservations
    ):
        return None
    books, rules = cycle.state.books, cycle.state.policy.queues[job.queue]
    units = job.gang.least_units
    held = books.held_by(job.queue, job.owner)
    if rules.max_gpus_per_owner is not None and held + units > rules.max_gpus_per_owner:
        return Reason(
            reasons.WAITING_FOR_QUOTA,
            f"{job.owner} holds {gpus_in_words(held)} in queue {job.queue}, where one owner may hold "
            f"{gpu_count(rules.max_gpus_per_owner):g}",
            {"held_gpus": gpu_count(held), "owner_limit_gpus": gpu_count(rules.max_gpus_per_owner)},
            "it starts when your own jobs give GPUs back",
        )
    kind = options[0].kind
    kept, owns = cycle.kept_units(job.queue, kind), books.quota.nominal(job.queue, kind)
    used = books.quota.usage(job.queue, kind) - kept
    left = max(0, books.quota.available(job.queue, kind))
    of_kind = "" if kind == "*" else f" {kind}"
    return Reason(
        reasons.WAITING_FOR_QUOTA,
        f"needs {gpus_in_words(units)}; queue {job.queue} owns {gpu_count(owns):g}{of_kind}, uses {gpu_count(used):g}"
        f"{f', keeps {gpu_count(kept):g} for jobs that come first' if kept else ''} "
        f"and may take {gpu_count(left):g} more",
        {
            "queue": job.queue,
            "kind": kind,
            "needed_gpus": gpu_count(units),
            "nominal_gpus": gpu_count(owns),
            "used_gpus": gpu_count(used),
            "kept_gpus": gpu_count(kept),
            "available_gpus": gpu_count(left),
        },
        "it starts when jobs of the queue, or of queues that borrow, give GPUs back",
    )


def _coming(cycle: Cycle, job: Job) -> Reason | None:
    """GPUs are on their way back for it."""
    reservation = cycle.kept.reservations.get(job.id)
    if reservation is None or reservation.at > cycle.now:
        return None
    names = reservation.evicting or tuple(sorted(job_id for job_id, _ in reservation.counted))
    listed = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    what = "is" if len(names) == 1 else "are"
    how = "being evicted for it" if reservation.evicting else "giving GPUs back"
    return Reason(
        reasons.WAITING_FOR_VICTIMS,
        f"{listed} {what} {how}",
        {"jobs": list(names), "needed_gpus": gpu_count(job.gang.gpu_units)},
        "it starts as soon as they have ended",
    )


def _cut_off(cycle: Cycle, job: Job, options: Sequence[Option]) -> Reason | None:
    """The cycle hit a bound before it looked at a way in which the job might have started."""
    if job.id not in cycle.kept.reservations:
        if "passes" in cycle.bounds and _fits_somewhere(cycle, job, options) is not None:
            return _not_evaluated("passes", "it fits, but who comes first was not settled")
        if "backfill_depth" in cycle.bounds and _fits_in_time(cycle, job, options):
            return _not_evaluated(
                "backfill_depth", "it fits and ends in time, but others like it were asked first"
            )
    if cycle.unsought(job, options) and has_a_right(job, [each.kind for each in options], cycle.state):
        return _not_evaluated("evictions_per_cycle", "whom to evict was looked up for others first")
    return None


def _not_evaluated(bound: str, what: str) -> Reason:
    return Reason(
        reasons.NOT_EVALUATED,
        f"{what}: the scheduler stopped at its bound {bound}",
        {"bound": bound},
        "it is looked at again with the next event, such as the end of a job",
    )


def _fits_in_time(cycle: Cycle, job: Job, options: Sequence[Option]) -> bool:
    """Whether the job has a place where it ends before what is kept there is due."""
    end = end_if_started(job, cycle.state, cycle.now)
    in_time = [each for each in options if end <= cycle.kept.due(each.classes)]
    with cycle.kept.passed_over():
        return _fits_somewhere(cycle, job, in_time) is not None


def _kept_for_others(cycle: Cycle, job: Job, options: Sequence[Option]) -> Reason | None:
    if not cycle.kept.holds or job.id in cycle.kept.reservations:
        return None
    with cycle.kept.passed_over():
        fits = _fits_somewhere(cycle, job, options)
    if fits is None:
        return None
    bare, bundle = job, Bundle(job.gang.bundle.gpu_units)
    if bundle != job.gang.bundle:
        bare = replace(job, gang=replace(job.gang, bundle=bundle))
    what = "GPUs" if _fits_somewhere(cycle, bare, options) is None else "CPUs and memory"
    owner = next(
        (each for each in cycle.kept.reservations.values() if any(node in each.need for node in fits)), None
    )
    if owner is None:
        return None
    at = None if owner.at == inf else owner.at
    in_s = max(0.0, owner.at - cycle.now)
    when = "at a time that nobody knows" if at is None else f"in {in_s:.0f} s at the latest"
    if owner.boots:
        when = f"when its other nodes have booted, in about {in_s:.0f} s"
    advice = (
        "a time limit that ends before then lets it start now"
        if at is not None
        else ("it would start now if the jobs that run had time limits, and it too")
    )
    return Reason(
        reasons.RESERVED,
        f"free {what} are kept for {owner.job_id}, which comes first and is due {when}",
        {"for": owner.job_id, "at": at, "kept": what},
        advice,
    )


def _fits_somewhere(cycle: Cycle, job: Job, options: Sequence[Option]) -> set[str] | None:
    for option in options:
        gang = cycle.within_quota(job, option)
        places = None if gang is None else cycle.place(gang, option)
        if places is not None:
            return {each.node_id for each in places}
    return None


def _fragmented(cycle: Cycle, job: Job, options: Sequence[Option]) -> Reason | None:
    classes = _classes(options)
    gang = job.gang.sized(job.gang.minimum)
    free = sum(each.free_units for each in classes)
    if free < gang.gpu_units or any(id(each) in cycle.closed for each in classes):
        return None
    most = _most_free(cycle, classes)
    bare = replace(gang, bundle=Bundle(gang.bundle.gpu_units))
    if place(bare, cycle.state.capacity, classes) is not None:
        return _no_host_resources(cycle, gang, classes)
    return Reason(
        reasons.FRAGMENTED,
        f"{gpus_in_words(free)} {_is(free)} free, but not as {gang}: the most on one node are {gpu_count(most):g}"
        f"{_and_withheld(classes)}",
        _evidence(gang, free, most) | _withheld_evidence(classes),
        "smaller bundles (more nodes with fewer GPUs each) could start sooner",
    )


def _no_host_resources(cycle: Cycle, gang: Gang, classes: Sequence[NodeClass]) -> Reason:
    capacity = cycle.state.capacity
    nodes = [
        node
        for node in cycle.state.nodes.values()
        if not node.cordoned and capacity.class_of(node.id) in classes
    ]
    cpus = max((node.cpu_free_milli - node.foreign_cpu_milli for node in nodes), default=0) / 1000
    memory = max((node.memory_free_bytes - node.foreign_memory_bytes for node in nodes), default=0) / 2**30
    free = sum(each.free_units for each in classes)
    return Reason(
        reasons.WAITING_FOR_CAPACITY,
        f"{gpus_in_words(gang.gpu_units)} {_is(gang.gpu_units)} free for it, but not its CPUs and memory beside them: "
        f"the most on one node are {cpus:g} CPUs and {memory:.1f} GiB",
        {
            **_evidence(gang, free, _most_free(cycle, classes)),
            "cpus_on_one_node": cpus,
            "memory_gib_on_one_node": round(memory, 1),
        },
        "a lower cpus_per_gpu or memory_per_gpu could start sooner",
    )


def _behind(cycle: Cycle, job: Job, options: Sequence[Option]) -> Reason | None:
    classes = {id(each) for each in _classes(options)}
    ahead = next((cycle.closed[each] for each in classes if each in cycle.closed), None)
    if ahead is None:
        first = cycle.first_blocked
        held = None if first is None else cycle.kept.reservations.get(first.id)
        if first is not None and (held is None or held.classes & classes):
            ahead = first
    if ahead is None or ahead.id == job.id or job.id in cycle.kept.reservations:
        return None
    return Reason(
        reasons.PRIORITY,
        f"waits behind {ahead.id}, which needs {ahead.gang} and comes first",
        {"behind": ahead.id, "needs": str(ahead.gang)},
        "a job with a higher priority is looked at earlier",
    )


def _no_capacity(cycle: Cycle, job: Job, options: Sequence[Option]) -> Reason:
    classes = _classes(options)
    free = sum(each.free_units for each in classes)
    gang = job.gang.sized(job.gang.minimum)
    return Reason(
        reasons.WAITING_FOR_CAPACITY,
        f"needs {gpus_in_words(gang.gpu_units)}, {gpu_count(free):g} {_is(free)} free{_and_withheld(classes)}",
        _evidence(gang, free, _most_free(cycle, classes)) | _withheld_evidence(classes),
        "it starts as soon as running jobs release enough",
    )


def _classes(options: Sequence[Option]) -> list[NodeClass]:
    return [each for option in options for each in option.classes]


def _most_free(cycle: Cycle, classes: Sequence[NodeClass]) -> int:
    """Units free on the node that has most."""
    capacity, most = cycle.state.capacity, 0
    for each in classes:
        for bucket in reversed(each.whole):
            if bucket:
                most = max(most, usable(capacity.node_numbered(bucket[0])).total_free)
                break
    return most


def _evidence(gang: Gang, free: int, most: int) -> dict[str, Any]:
    return {
        "needed_gpus": gpu_count(gang.gpu_units),
        "free_gpus": gpu_count(free),
        "free_on_one_node": gpu_count(most),
    }


def _cordoned(classes: Sequence[NodeClass]) -> tuple[int, int]:
    """How many nodes of these classes are cordoned, and the units of their GPUs, in use or not."""
    count = sum(each.cordoned for each in classes)
    return count, sum(each.cordoned * each.key.gpu_slots * GPU_UNIT for each in classes)


def _withheld_evidence(classes: Sequence[NodeClass]) -> dict[str, Any]:
    count, units = _cordoned(classes)
    evidence = {"cordoned_nodes": count, "cordoned_gpus": gpu_count(units)} if count else {}
    if strays := sum(each.quarantined for each in classes):
        evidence["quarantined_gpus"] = gpu_count(strays)
    return evidence


def _and_withheld(classes: Sequence[NodeClass]) -> str:
    count, units = _cordoned(classes)
    words = f"; {_nodes_are_cordoned(count, units)}" if count else ""
    if strays := sum(each.quarantined for each in classes):
        words += f"; {gpus_in_words(strays)} {_is(strays)} in quarantine, see `rmctl nodes`"
    return words


def _nodes_are_cordoned(count: int, units: int) -> str:
    nodes, are = ("node", "is") if count == 1 else ("nodes", "are")
    return f"{count} {nodes} ({gpus_in_words(units)}) {are} cordoned"


def _is(units: int) -> str:
    return "is" if units == GPU_UNIT else "are"
