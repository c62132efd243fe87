"""Whatever happens in whatever order, the books balance. The fake cluster checks itself after every event."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rm.core.cycle import schedule
from rm.core.events import JobAdmitted, NodeCordoned, NodeUncordoned
from rm.core.model import Strategy
from rm.core.resources import GPU_UNIT, Devices, gpu_units
from rm.core.state import ClusterState
from rm.testing import Behaviour, FakeCluster

FATES = st.lists(st.sampled_from(["ok", "ok", "fail", "lost", "unready"]), min_size=0, max_size=3).map(
    lambda fates: (*fates, "ok")
)
SIZES = st.sampled_from([0.25, 0.5, 0.3, 1, 1, 2, 3, 4, 8])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"), SIZES, st.integers(1, 3), st.sampled_from(list(Strategy)),
            FATES, st.sampled_from([None, 1.0, 30.0]), st.integers(-1, 1),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("step"), st.integers(1, 10)),
        st.tuples(st.just("lose"), st.integers(0, 3)),
        st.tuples(st.just("join"), st.integers(1, 8)),
        st.tuples(st.just("cordon"), st.integers(0, 3), st.booleans(), st.sampled_from([None, 0.0, 3.0])),
        st.tuples(st.just("uncordon"), st.integers(0, 3)),
        st.tuples(st.just("quarantine"), st.integers(0, 3), st.integers(0, 9)),
    ),
    min_size=1,
    max_size=40,
)  # fmt: skip


def play(fake: FakeCluster, actions: list[tuple]) -> None:
    joined = 0
    for kind, *rest in actions:
        if kind == "submit":
            gpus, count, strategy, fates, limit, priority = rest
            fake.submit(
                gpus,
                count=1 if gpus < 1 else count,
                strategy=strategy,
                behaviour=Behaviour(5.0, fates),
                time_limit_s=limit,
                priority=priority,
                max_retries=1,
                max_infra_retries=1,
            )
        elif kind == "cancel" and fake.state.jobs:
            ids = sorted(fake.state.jobs)
            fake.cancel(ids[rest[0] % len(ids)])
        elif kind == "step":
            for _ in range(rest[0]):
                fake.step()
        elif kind == "lose" and fake.state.nodes:
            ids = sorted(fake.state.nodes)
            fake.lose_node(ids[rest[0] % len(ids)])
        elif kind == "cordon" and fake.state.nodes:
            ids = sorted(fake.state.nodes)
            node, draining, delay = rest
            deadline = fake.now + delay if draining and delay is not None else None
            fake.cordon(ids[node % len(ids)], draining=draining, deadline=deadline)
        elif kind == "uncordon" and fake.state.nodes:
            ids = sorted(fake.state.nodes)
            fake.uncordon(ids[rest[0] % len(ids)])
        elif kind == "quarantine" and fake.state.nodes:
            ids = sorted(fake.state.nodes)
            fake.quarantine(ids[rest[0] % len(ids)], rest[1])
        elif kind == "join":
            joined += 1
            fake.add_node(f"x{joined}", rest[0])


def played(actions: list[tuple]) -> FakeCluster:
    """Two nodes, of 4 and 8 GPUs, on which all of it has happened."""
    fake = FakeCluster()
    fake.add_node("n0", 4)
    fake.add_node("n1", 8)
    play(fake, actions)
    return fake


@settings(max_examples=300, deadline=None)
@given(ACTIONS)
def test_the_books_balance_at_every_moment_and_all_is_free_at_the_end(actions: list[tuple]) -> None:
    fake = played(actions)
    assert schedule(fake.state, fake.now).events == (), "a second cycle at the same moment is empty"
    fake.add_node("big", 8)
    fake.add_node("big2", 8)
    fake.add_node("big3", 8)
    fake.run()
    for node_id in sorted(fake.state.nodes):
        fake.uncordon(node_id)
        fake.quarantine(node_id, 0)
    fake.run()
    totals = fake.state.totals()
    assert (totals.charged, totals.foreign) == (0, 0)
    assert not fake.held
    left = {job.id: str(job.gang) + job.gang.strategy for job in fake.state.jobs.values()}
    assert all(job.attempt is None for job in fake.state.jobs.values())
    # What is still queued could not be held by any mix of the nodes, else it would have run.
    assert all("STRICT_PACK" in shape or "STRICT_SPREAD" in shape for shape in left.values()), left


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_nothing_starts_on_a_cordoned_node_and_nothing_stays_on_a_drained_one(actions: list[tuple]) -> None:
    fake = played(actions)
    cordoned: set[str] = set()
    for event in fake.history:
        match event:
            case NodeCordoned():
                cordoned.add(event.node_id)
            case NodeUncordoned():
                cordoned.discard(event.node_id)
            case JobAdmitted():
                assert cordoned.isdisjoint(each.node_id for each in event.placed)
    assert fake.state.cordons.keys() == cordoned
    for node_id in sorted(fake.state.nodes):
        fake.quarantine(node_id, 0)
    fake.run()
    overdue = [each for each in fake.state.cordons.values() if each.deadline is not None]
    assert not any(each.node_id in fake.state.books.charged_on for each in overdue)


@settings(max_examples=100, deadline=None)
@given(ACTIONS)
def test_a_quarantine_takes_what_is_free_and_no_more_and_gives_all_of_it_back(actions: list[tuple]) -> None:
    fake = played(actions)
    for node_id in sorted(fake.state.nodes):
        fake.quarantine(node_id, 8)
    before = fake.state.totals()
    assert before.free == 0, "eight are as many as a node has"
    admitted = len([each for each in fake.history if isinstance(each, JobAdmitted)])
    fake.run()
    assert len([each for each in fake.history if isinstance(each, JobAdmitted)]) == admitted, (
        "nothing starts there"
    )
    assert not fake.held, "what ran has ended as ever"
    for node_id in sorted(fake.state.nodes):
        fake.quarantine(node_id, 0)
    totals = fake.state.totals()
    assert totals.charged + totals.free == totals.capacity or fake.state.cordons
    fake.state.check()


@settings(max_examples=100, deadline=None)
@given(ACTIONS)
def test_reloading_the_records_at_any_moment_gives_the_same_state(actions: list[tuple]) -> None:
    fake = FakeCluster()
    fake.add_node("n0", 8)
    play(fake, actions)
    again = ClusterState()
    again.restore(fake.state.jobs.values(), cordons=fake.state.cordons.values())
    assert again.jobs == fake.state.jobs
    assert again.cordons == fake.state.cordons
    assert sorted(again.pending.ids()) == sorted(fake.state.pending.ids())
    again.check()


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.9, 1, 2, 3]), max_size=20), st.randoms())
def test_devices_give_back_exactly_what_was_taken(sizes: list[float], random) -> None:
    devices = Devices.whole(6)
    taken = []
    for size in sizes:
        units = gpu_units(size)
        if devices.fits(units):
            slots, devices = devices.take(units)
            taken.append((slots, units))
            assert all(0 <= free <= GPU_UNIT for free in devices.free)
    random.shuffle(taken)
    for slots, units in taken:
        devices = devices.give(slots, units)
    assert devices == Devices.whole(6)


@settings(deadline=None)
@given(st.integers(0, 8 * GPU_UNIT), st.integers(0, 8))
def test_foreign_use_never_frees_anything(units: int, ours: int) -> None:
    _, devices = Devices.whole(8).take(ours * GPU_UNIT) if ours else ((), Devices.whole(8))
    left = devices.without_foreign(units)
    assert left.total_free == max(0, devices.total_free - units)
    assert all(after <= before for after, before in zip(left.free, devices.free, strict=True))
