"""What a reservation is, and what has to stay free so that it holds.

A reservation names the nodes on which a job will fit at some time. What of a node's free GPUs, CPUs and memory must
stay free for that is its `hold`: what it needs then, less what comes back by then and is not counted on by others.
`backfill` and the searches for victims make reservations; `keeping` subtracts their holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from rm.core.books import START_S
from rm.core.capacity import NodeClass, copies_in, usable
from rm.core.model import Attempt, Job, PlacedBundle
from rm.core.resources import GPU_UNIT, NOTHING, Amount, Bundle, Devices
from rm.core.state import ClusterState


@dataclass(frozen=True, slots=True)
class Reservation:
    """A date and places for one job. `need`: by node. `at`: the shadow time, infinite where unknown.

    `counted`: the attempts on those nodes whose end it waits for. `classes`: the node classes that it covers; a
    second reservation on other classes is possible.
    `evicting`: jobs that were told to stop for it; empty where it waits for ends that come anyway.
    `boots`: its places on nodes that boot, by `launches.boot_id`; `need` is without them.
    """

    job_id: str
    at: float
    need: Mapping[str, Amount]
    classes: frozenset[int]
    counted: frozenset[tuple[str, int]] = frozenset()
    evicting: tuple[str, ...] = ()
    boots: tuple[PlacedBundle, ...] = ()


@dataclass(frozen=True, slots=True)
class Promised:
    """What the running cycle has promised so far.

    `owed`: by node, what reservations need beyond what is kept for them. `holders`: who has a reservation.
    `stopped`: whom the cycle has told to stop.
    """

    owed: Mapping[str, Amount]
    holders: Collection[str] = ()
    stopped: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Taken:
    """A bundle that the running cycle has given away on one node, and when it comes back by what is known."""

    attempt: tuple[str, int]
    slots: tuple[int, ...]
    bundle: Bundle
    end: float


def needs(bundle: Bundle, places: Iterable[PlacedBundle]) -> dict[str, Amount]:
    """What these places take, by node."""
    counts = Counter(each.node_id for each in places)
    return {node_id: Amount.of(bundle, count) for node_id, count in counts.items()}


def class_ids(classes: Sequence[NodeClass]) -> frozenset[int]:
    """What tells classes apart as long as they live."""
    return frozenset(id(each) for each in classes)


def lives(job_id: str, attempt: int, state: ClusterState) -> bool:
    """Whether this attempt of the job still holds its GPUs."""
    job = state.jobs.get(job_id)
    return job is not None and job.attempt is not None and job.attempts == attempt


def has_room(
    reservation: Reservation,
    state: ClusterState,
    job: Job,
    taken: Mapping[str, Sequence[Taken]],
    owed: Mapping[str, Amount],
) -> bool:
    """Whether its nodes are there, and hold what it needs when it is due beside what is `owed` to others."""
    bundle = job.gang.bundle
    for node_id, need in reservation.need.items():
        if node_id not in state.capacity or state.capacity[node_id].cordoned:
            return False
        then = _free_at(node_id, reservation, state, taken.get(node_id, ()))
        if node_id in owed:
            then = then.without(owed[node_id])
        if then.copies(bundle) * bundle.gpu_units < need.gpu_units:
            return False
    return True


def hold(reservation: Reservation, node_id: str, state: ClusterState, taken: Sequence[Taken]) -> Amount:
    """What of the free GPUs, CPUs and memory of the node must stay free for the reservation from now on."""
    need = reservation.need[node_id]
    if node_id not in state.capacity:
        return NOTHING
    node = state.capacity[node_id]
    then = _free_at(node_id, reservation, state, taken)
    return Amount(
        _devices_to_hold(need.gpu_units, usable(node), then.devices),
        _to_hold(need.cpu_milli, node.cpu_free_milli - node.foreign_cpu_milli, then.cpu_milli),
        _to_hold(need.memory_bytes, node.memory_free_bytes - node.foreign_memory_bytes, then.memory_bytes),
    )


def _to_hold(need: int, free_now: int, free_then: int) -> int:
    """What of `free_now` must stay, so that `need` is there then. More than that will be spare."""
    return max(0, free_now - max(0, free_then - need))


def _devices_to_hold(need: int, free_now: Devices, free_then: Devices) -> int:
    """The same in units of GPUs, where shares of different devices do not make a whole."""
    if need < GPU_UNIT:
        return min(need, max(free_now.free, default=0))
    spare = max(0, free_then.free.count(GPU_UNIT) - need // GPU_UNIT)
    shared = sum(0 < now < GPU_UNIT == then for now, then in zip(free_now.free, free_then.free, strict=True))
    if shared > spare:
        return free_now.total_free  # a share of any device could cost the reservation a whole one
    return max(0, free_now.free.count(GPU_UNIT) + shared - spare) * GPU_UNIT


def end_if_started(job: Job, state: ClusterState, now: float) -> float:
    """When `job`, started now, is surely gone; infinite where nothing limits it."""
    limit_s = job.time_limit_s
    if limit_s is None and state.policy.predicted_limits:
        prediction = state.predictor.predict(job, job.ran_s)
        limit_s = None if prediction is None else prediction.p90_s - job.ran_s
    return inf if limit_s is None else now + START_S + limit_s + job.grace_s


@dataclass(frozen=True, slots=True)
class _Room:
    """What is free on one node at some time."""

    devices: Devices
    cpu_milli: int
    memory_bytes: int

    def copies(self, bundle: Bundle) -> int:
        return copies_in(bundle, self.devices, self.cpu_milli, self.memory_bytes)

    def without(self, others: Amount) -> _Room:
        return _Room(
            self.devices.without_foreign(others.gpu_units),
            self.cpu_milli - others.cpu_milli,
            self.memory_bytes - others.memory_bytes,
        )


def _free_at(node_id: str, reservation: Reservation, state: ClusterState, taken: Sequence[Taken]) -> _Room:
    """What is free on the node once all that the reservation counts on has ended."""
    node = state.capacity[node_id]
    devices, cpu_milli, memory_bytes = Devices.whole(node.gpu_slots), node.cpu_milli, node.memory_bytes
    for slots, bundle in _still_there(node_id, reservation, state, taken):
        devices = devices.take_slots(slots, bundle.gpu_units)
        cpu_milli -= bundle.cpu_milli
        memory_bytes -= bundle.memory_bytes
    # During a trial what is foreign includes what is kept for others.
    return _Room(
        devices.without_foreign(node.foreign_units),
        cpu_milli - node.foreign_cpu_milli,
        memory_bytes - node.foreign_memory_bytes,
    )


def _still_there(
    node_id: str, reservation: Reservation, state: ClusterState, taken: Sequence[Taken]
) -> Iterator[tuple[tuple[int, ...], Bundle]]:
    """Device slots and bundle of whatever on the node will not have ended when the reservation is due."""
    for job_id in state.books.charged_on.get(node_id, ()):
        job = state.jobs[job_id]
        assert job.attempt is not None
        if (job_id, job.attempts) in reservation.counted:
            continue
        if job_id in state.books.ending and not claimed(job.attempt, state, reservation.job_id):
            continue
        if state.books.planned_end(job) <= reservation.at < inf:
            continue
        for each in job.attempt.placed:
            if each.node_id == node_id:
                yield each.slots, job.gang.bundle
    for mine in taken:
        if mine.attempt not in reservation.counted and not mine.end <= reservation.at < inf:
            yield mine.slots, mine.bundle


def coming(state: ClusterState, for_job: str, promised: Promised) -> Iterator[Job]:
    """The jobs whose GPUs are on their way back and that `for_job` may count on, less what is owed.

    What was evicted for a job that stands behind is left out: the eviction was measured so that all who stand
    before that job keep what they have, and it must not be planned with twice.
    """
    for job_id in (*state.books.ending, *promised.stopped):
        job = state.jobs[job_id]
        assert job.attempt is not None
        if not claimed(job.attempt, state, for_job) or job.attempt.stop_by in promised.holders:
            yield job


def claimed(attempt: Attempt, state: ClusterState, for_job: str) -> bool:
    """Whether the attempt was evicted for another job than this one, and that job could still start."""
    if attempt.stop is None or not attempt.stop.comes_back or attempt.stop_by == for_job:
        return False
    return state.pending.group_of(attempt.stop_by) is not None
