"""Placement, reservations and evictions on clusters so small that every possibility can be tried."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import inf

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rm.core.backfill import reserve
from rm.core.capacity import Capacity, usable
from rm.core.events import CheckpointReported, PlacementReady, RunStarted
from rm.core.model import Gang, Job, Node, StopCause, Strategy
from rm.core.placement import place, place_elastic
from rm.core.policy import ANY, Backfill, Policy, Preempt, QueuePolicy
from rm.core.preemption import Victims
from rm.core.reservations import Promised
from rm.core.resources import GPU_UNIT, Bundle, Devices
from rm.testing import Behaviour, FakeCluster

FREE = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def capacity_of(free: list[int], cpus: list[int] | None = None) -> Capacity:
    capacity = Capacity()
    for number, count in enumerate(free):
        devices = Devices(tuple(GPU_UNIT if slot < count else 0 for slot in range(4)))
        cpu = 1000 * (cpus[number] if cpus else 64)
        capacity.join(Node(f"n{number}", f"n{number}", 4, devices, 64_000, cpu, 2**38, 2**38))
    return capacity


def naive_pack(free: list[int], gpus: int, count: int, *, strict: bool) -> list[int] | None:
    """Nodes by bundle: the fullest that takes all that is missing, else one that takes most, ties to the fuller."""
    left, chosen = dict(enumerate(free)), []
    while len(chosen) < count:
        missing = count - len(chosen)
        able = [(number, have // gpus, have) for number, have in left.items() if have >= gpus]
        if not able:
            return None
        number, fits, _ = min(able, key=lambda each: (-min(each[1], missing), each[2], each[0]))
        if strict and fits < missing:
            return None
        chosen += [number] * min(fits, missing)
        del left[number]
    return chosen


@settings(max_examples=200, deadline=None)
@given(FREE, st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_packing_by_the_index_is_packing_by_looking_at_every_node(
    free: list[int], gpus: int, count: int, strict: bool
) -> None:
    gang = Gang(Bundle(gpus * GPU_UNIT), count, Strategy.STRICT_PACK if strict else Strategy.PACK)
    places = place(gang, capacity_of(free))
    expected = naive_pack(free, gpus, count, strict=strict)
    found = None if places is None else [each.node_id for each in places]
    if expected is None or found is None:
        assert found is expected is None
        return
    # Nodes that are equally full are equally good.
    assert [free[int(name[1:])] for name in found] == [free[number] for number in expected]
    assert all(found.count(name) * gpus <= free[int(name[1:])] for name in found)


@settings(max_examples=200, deadline=None)
@given(FREE, st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_spreading_by_the_index_is_spreading_by_looking_at_every_node(
    free: list[int], gpus: int, count: int, strict: bool
) -> None:
    gang = Gang(Bundle(gpus * GPU_UNIT), count, Strategy.STRICT_SPREAD if strict else Strategy.SPREAD)
    places = place(gang, capacity_of(free))
    able = sorted(have for have in free if have >= gpus)
    if strict:
        assert (places is not None) == (len(able) >= count)
    if places is not None:
        nodes = {each.node_id for each in places}
        assert len(nodes) == min(count, len(able)) or not strict
        if len(able) >= count:
            assert sorted(free[int(name[1:])] for name in nodes) == able[:count], "the fullest that fit"
            assert len(nodes) == count
    elif not strict:
        assert sum(have // gpus for have in free) < count or len(able) > count


@settings(max_examples=200, deadline=None)
@given(
    FREE,
    st.lists(st.integers(0, 8), min_size=5, max_size=5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_a_gang_with_cpus_is_placed_wherever_it_fits(
    free: list[int], cpus: list[int], gpus: int, cpu: int, count: int
) -> None:
    capacity = capacity_of(free, cpus)
    fits = sum(min(have // gpus, cpus[number] // cpu) for number, have in enumerate(free))
    places = place(Gang(Bundle(gpus * GPU_UNIT, cpu * 1000), count), capacity)
    assert (places is not None) == (fits >= count)
    if places is not None:
        capacity.take(Bundle(gpus * GPU_UNIT, cpu * 1000), places)
        assert all(node.cpu_free_milli >= 0 for node in capacity.nodes.values())


@settings(deadline=None)
@given(FREE, st.integers(1, 3), st.integers(1, 6), st.data())
def test_an_elastic_gang_takes_all_that_there_is(
    free: list[int], gpus: int, count: int, data: st.DataObject
) -> None:
    least = data.draw(st.integers(1, count))
    places = place_elastic(Gang(Bundle(gpus * GPU_UNIT), count, least=least), capacity_of(free))
    most = min(count, sum(have // gpus for have in free))
    assert (len(places) if places else 0) == (most if most >= least else 0)


# --- reservations -------------------------------------------------------------------------------------------


def running(fake: FakeCluster) -> None:
    """Everybody who was admitted runs from this very moment on."""
    for job in list(fake.state.jobs.values()):
        if job.attempt is not None and job.attempt.started_at is None:
            fake.state.apply(PlacementReady(fake.now, job.id, 1))
            fake.state.apply(RunStarted(fake.now, job.id, 1))


def ends(fake: FakeCluster) -> list[tuple[float, Job]]:
    runs = [
        (fake.state.books.planned_end(job), job)
        for job in fake.state.jobs.values()
        if job.attempt is not None
    ]
    return sorted(runs, key=lambda each: each[0])


def fits_without(fake: FakeCluster, gone: list[Job], gang: Gang) -> bool:
    """Whether the gang fits once these have ended, counted GPU by GPU."""
    free = {node.id: usable(node).free.count(GPU_UNIT) for node in fake.state.nodes.values()}
    for job in gone:
        assert job.attempt is not None
        for each in job.attempt.placed:
            free[each.node_id] += job.gang.bundle.gpu_units // GPU_UNIT
    gpus = gang.bundle.gpu_units // GPU_UNIT
    return sum(have // gpus for have in free.values()) >= gang.minimum


RUNS = st.lists(
    st.tuples(
        st.integers(1, 4), st.sampled_from([None, 50.0, 100.0, 100.0, 300.0]), st.sampled_from([-100, 0, 100])
    ),
    min_size=1,
    max_size=8,
)
NODES = st.lists(st.sampled_from([2, 4]), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(NODES, RUNS, st.integers(1, 4), st.integers(1, 3))
def test_the_date_of_a_reservation_is_the_earliest(
    nodes: list[int], runs: list[tuple[int, float | None, int]], gpus: int, count: int
) -> None:
    fake = FakeCluster(policy=Policy(backfill=Backfill.SKIP))
    for number, slots in enumerate(nodes):
        fake.add_node(f"n{number}", slots)
    for size, limit, _ in runs:
        fake.submit(size, time_limit_s=limit, grace_s=0.0)
    running(fake)
    gang = Gang(Bundle(gpus * GPU_UNIT), count)
    assume(not fits_without(fake, [], gang))
    job = Job("new", 99, "new", "ann", next(iter(fake.state.jobs.values())).kind, gang, fake.now)
    known = ends(fake)
    earliest = next(
        (end for end, _ in known if fits_without(fake, [each for at, each in known if at <= end], gang)), None
    )
    found = reserve(job, fake.state, fake.state.capacity.matching(gang), Promised({}), fake.now)
    assert (None if found is None else found.at) == earliest
    if found is not None and found.at < inf:
        assert sum(need.gpu_units for need in found.need.values()) == gang.gpu_units


# --- evictions ----------------------------------------------------------------------------------------------


def lawful(fake: FakeCluster, priority: int) -> list[Job]:
    return [job for job in fake.state.jobs.values() if job.attempt is not None and job.priority < priority]


def subsets(jobs: list[Job]) -> Iterator[tuple[Job, ...]]:
    for size in range(len(jobs) + 1):
        yield from combinations(jobs, size)


@settings(max_examples=200, deadline=None)
@given(NODES, RUNS, st.integers(1, 4), st.integers(1, 2), st.lists(st.booleans(), min_size=8, max_size=8))
def test_victims_are_found_where_there_are_any_and_none_can_be_put_back(
    nodes: list[int], runs: list[tuple[int, float | None, int]], gpus: int, count: int, saved: list[bool]
) -> None:
    fake = FakeCluster(
        policy=Policy(
            queues={"a": QueuePolicy("a", preempt=Preempt.LOWER)}, default_queue="a", backfill=Backfill.SKIP
        )
    )
    for number, slots in enumerate(nodes):
        fake.add_node(f"n{number}", slots)
    for size, _, priority in runs:
        fake.submit(size, queue="a", priority=priority, behaviour=Behaviour(1e6))
    running(fake)
    fake.now += 100
    for job, yes in zip(list(fake.state.jobs.values()), saved, strict=False):
        if yes and job.attempt is not None:
            fake.state.apply(CheckpointReported(fake.now - 10, job.id, 1))
    gang = Gang(Bundle(gpus * GPU_UNIT), count)
    assume(not fits_without(fake, [], gang))
    new = Job(
        "new",
        99,
        "new",
        "ann",
        next(iter(fake.state.jobs.values())).kind,
        gang,
        fake.now,
        queue="a",
        priority=100,
    )
    victims_of = Victims(fake.state, fake.now, lambda _: None)
    found = victims_of.evict(new, ANY, fake.state.capacity.matching(gang), Promised({}))
    possible = any(fits_without(fake, list(chosen), gang) for chosen in subsets(lawful(fake, 100)))
    assert (found is not None) == possible
    if found is None:
        return
    victims = [fake.state.jobs[job_id] for job_id, cause in found.victims]
    assert all(cause is StopCause.PREEMPTED for _, cause in found.victims)
    assert all(each.priority < 100 for each in victims)
    assert fits_without(fake, victims, gang)
    for spared in victims:
        assert not fits_without(fake, [each for each in victims if each is not spared], gang), (
            "could be put back"
        )
    # No higher priority goes where lower ones alone would do.
    worst = max(each.priority for each in victims)
    below = [each for each in lawful(fake, 100) if each.priority < worst]
    assert not any(fits_without(fake, list(chosen), gang) for chosen in subsets(below))
