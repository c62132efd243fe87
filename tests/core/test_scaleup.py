"""What is wanted of an autoscaler: how much of it, for random clusters and queues."""

from __future__ import annotations

from math import ceil

from hypothesis import given, settings
from hypothesis import strategies as st

from rm.core.cycle import why
from rm.core.events import (
    ForeignUseObserved,
    JobAdmitted,
    JobSubmitted,
    LaunchesObserved,
    LaunchFailed,
    NodeTypesObserved,
)
from rm.core.model import GPU_TYPE, Gang, NodeShape
from rm.core.records import replace
from rm.core.resources import Bundle
from rm.core.scaleup import decide
from rm.testing import Behaviour, FakeCluster


def shape(name: str, gpus: int, most: int, kind: str = "") -> NodeShape:
    return NodeShape(gpus, 64_000, 2**38, ((GPU_TYPE, kind),) if kind else (), most, name)


def cluster(*shapes: NodeShape, most_in_all: int | None = None) -> FakeCluster:
    fake = FakeCluster()
    fake.add_node("head", 0)
    fake.happen(NodeTypesObserved(0, shapes, most_in_all))
    return fake


def nodes_wanted(fake: FakeCluster) -> dict[str, int]:
    return fake.state.launches.wanted.nodes()


def test_a_burst_of_a_hundred_one_gpu_jobs_wants_thirteen_nodes() -> None:
    fake = cluster(shape("a", 8, 50))
    for _ in range(100):
        fake.submit(1)
    assert nodes_wanted(fake) == {"a": 13}


def test_a_mixed_burst_is_packed() -> None:
    """Sixty jobs in the order that packs worst: the small ones first."""
    fake = cluster(shape("a", 8, 60))
    sizes = [1, 2, 3, 5] * 12 + [8] * 6 + [4] * 6
    for gpus in sizes:
        fake.submit(gpus)
    assert sum(sizes) / 8 <= nodes_wanted(fake)["a"] <= 1.15 * ceil(sum(sizes) / 8)


def test_the_largest_are_packed_first_where_that_takes_fewer_nodes() -> None:
    """One after the other, 6 of 8 GPUs would be all that a third node is asked for."""
    fake = cluster(shape("a", 8, 60))
    for gpus in (2, 3, 5, 6):
        fake.submit(gpus)
    assert nodes_wanted(fake) == {"a": 2}


def test_what_boots_counts_and_what_has_come_is_used() -> None:
    fake = cluster(shape("a", 8, 3))
    job = fake.submit(nodes := 8, count=4)
    assert not nodes_wanted(fake), "a gang that does not fit asks for nothing"
    fake.cancel(job)
    fake.submit(nodes, count=3)
    assert nodes_wanted(fake) == {"a": 3}
    fake.happen(LaunchesObserved(0, (), (("a", 3),)))
    assert nodes_wanted(fake) == {"a": 3}
    fake.submit(1)
    assert nodes_wanted(fake) == {"a": 3}, "nothing is left to launch"


def test_all_types_together_have_a_bound_too() -> None:
    fake = cluster(shape("a", 8, 3), shape("b", 4, 3), most_in_all=2)
    fake.submit(8, count=3)
    assert not nodes_wanted(fake)
    fake.submit(8, count=2)
    assert nodes_wanted(fake) == {"a": 2}


def test_a_pause_doubles_and_ends_with_a_node() -> None:
    fake = cluster(shape("a", 8, 3))
    fake.submit(8)
    for pause_s in (60, 120, 240):
        fake.happen(LaunchFailed(fake.now, "a", "none left"), LaunchFailed(fake.now, "a", "none left"))
        assert not nodes_wanted(fake)
        fake.now += pause_s - 1
        fake.happen()
        assert not nodes_wanted(fake)
        fake.now += 1
        fake.happen()
        assert nodes_wanted(fake) == {"a": 1}
    fake.add_node("n1", 8)
    fake.happen(LaunchesObserved(fake.now, (("a", 1),), ()))
    assert not fake.state.launches.failures


def test_the_cheaper_of_two_types_that_waste_as_little() -> None:
    fake = cluster(shape("dear", 8, 3), shape("cheap", 8, 3))
    fake.apply_policy(type(fake.policy)(prices={"dear": 12.0, "cheap": 3.5}))
    fake.submit(8)
    assert nodes_wanted(fake) == {"cheap": 1}


def test_what_is_on_its_way_since_when_and_for_whom() -> None:
    fake = cluster(shape("a", 8, 3), shape("b", 4, 3))
    fake.now = 10
    first, second = fake.submit(8), fake.submit(8)
    fake.now = 12
    fake.happen(LaunchesObserved(12, (), (("a", 1), ("b", 1))))
    fake.now = 20
    fake.happen(LaunchesObserved(20, (), (("a", 2), ("b", 1))))

    def coming() -> list[tuple[str, float, bool, tuple[str, ...]]]:
        return [
            (each.shape.name, each.since, each.booting, each.jobs)
            for each in fake.state.launches.on_their_way(fake.now)
        ]

    b = ("b", 12, True, ())
    assert coming() == [("a", 10, True, (first,)), ("a", 20, True, (second,)), b], (
        "b comes although nobody asked"
    )
    third = fake.submit(8)
    assert coming() == [
        ("a", 10, True, (first,)), ("a", 20, True, (second,)), ("a", 10, False, (third,)), b
    ]  # fmt: skip
    fake.add_node("n", 8)
    fake.happen(LaunchesObserved(30, (("a", 1),), (("a", 1),)))
    assert coming()[0] == ("a", 20, True, (second,)), "the oldest has come"
    assert fake.state.launches.boot_s("a", fake.policy) == 20


def test_a_node_that_is_smaller_than_its_type_declares_is_not_asked_for_again_and_again() -> None:
    fake = cluster(shape("a", 8, 9))
    job = fake.submit(8)
    for number, pause_s in enumerate((60, 120, 240), 1):
        assert nodes_wanted(fake) == {"a": 1}
        fake.add_node(f"n{number}", 4)
        fake.happen(LaunchesObserved(fake.now, (("a", number),), (), (("a", number, 4),)))
        assert not nodes_wanted(fake)
        failure = fake.state.launches.failures["a"]
        assert (failure.in_a_row, failure.until) == (number, fake.now + pause_s)
        assert failure.message == "a node of it came with 4 GPUs, and the type declares 8"
        reason = why(fake.state, fake.state.jobs[job], fake.now)
        assert reason.code == "LaunchFailed"
        assert reason.message == f"a node of type a could not be had: {failure.message}"
        fake.happen(LaunchesObserved(fake.now, (("a", number),), (), (("a", number, 4),)))
        assert fake.state.launches.failures["a"] == failure, "one node is told of once"
        fake.now = failure.until
        fake.happen()
    small = fake.submit(4)
    assert fake.state.jobs[small].attempt is not None, "what it has can be used"
    fake.add_node("whole", 8)
    fake.happen(LaunchesObserved(fake.now, (("a", 4),), (), (("a", 3, 4),)))
    assert not fake.state.launches.failures
    assert fake.state.jobs[job].attempt is not None


def test_a_job_that_came_before_the_node_types_waits_for_them_and_is_cut_by_them() -> None:
    fake = FakeCluster()
    fake.add_node("head", 0)
    fake.happen(NodeTypesObserved(0, (), None, awaited=True))
    job, small, gone = fake.submit(12, uncut=True), fake.submit(2, uncut=True), fake.submit(4, uncut=True)
    reason = why(fake.state, fake.state.jobs[job], fake.now)
    assert (reason.code, reason.evidence) == ("NotEvaluated", {"needs": "12 GPU", "node_types": "awaited"})
    assert "what can be launched is not known yet" in reason.message
    fake.cancel(gone)
    fake.happen(NodeTypesObserved(1, (shape("a", 8, 2),)))
    gangs = {
        each.id: (each.gang.count, each.gang.bundle.gpu_units, each.uncut)
        for each in fake.state.jobs.values()
    }
    assert gangs == {job: (2, 60_000, False), small: (1, 20_000, False)}
    assert nodes_wanted(fake) == {"a": 2}


def test_without_an_autoscaler_after_all_the_job_says_that_it_is_infeasible() -> None:
    fake = FakeCluster()
    fake.add_node("n", 4)
    fake.happen(NodeTypesObserved(0, (), None, awaited=True))
    large = fake.submit(16, uncut=True)
    two = fake.submit(8, uncut=True)
    fits = fake.submit(2, uncut=True)
    assert fake.state.jobs[fits].attempt is not None, "what fits starts at once"
    assert not fake.state.jobs[fits].uncut
    fake.happen(NodeTypesObserved(1, ()))
    for job in (large, two):
        assert why(fake.state, fake.state.jobs[job], fake.now).code == "Infeasible"
        assert fake.state.jobs[job].gang.count == 1


def test_a_node_that_joins_after_its_type_was_told_is_returnable_all_the_same() -> None:
    fake = cluster(shape("a", 8, 3))
    fake.happen(LaunchesObserved(0, (("a", 1),), (), returnable=("n",)))
    fake.add_node("n", 8)
    assert fake.state.nodes["n"].returnable


def test_a_node_on_which_a_job_starts_need_not_be_kept() -> None:
    fake = cluster(shape("a", 8, 2))
    fake.happen(LaunchesObserved(0, (("a", 2),), (), returnable=("n1", "n2")))
    fake.add_node("n1", 8)
    fake.add_node("n2", 8)
    fake.submit(8, behaviour=Behaviour(1000), time_limit_s=1000)
    gang = fake.submit(8, count=2)
    assert fake.state.launches.wanted.stay == ("n2",)
    short = replace(fake.state.jobs[gang], id="short", seq=9, gang=Gang(Bundle(10_000)), time_limit_s=60.0)
    fake.state.apply(JobSubmitted(fake.now, short))
    plan = decide(fake.state, fake.now)
    assert [each.job_id for each in plan.events if isinstance(each, JobAdmitted)] == ["short"]
    assert fake.state.launches.wanted.stay == ()


def test_since_when_a_node_is_idle() -> None:
    fake = cluster()
    fake.now = 5
    fake.add_node("n", 8)
    idle = fake.state.idle_since
    assert idle["n"] == 5
    fake.now = 10
    first = fake.submit(2)
    fake.submit(2, behaviour=Behaviour(100))
    assert "n" not in idle
    fake.run(lambda: first in fake.ended)
    assert "n" not in idle, "another still holds GPUs there"
    fake.run()
    assert idle["n"] == fake.now
    since = fake.now
    fake.happen(ForeignUseObserved(fake.now, "n", 10_000, 0, 0))
    assert "n" not in idle
    fake.now = since + 7
    fake.happen(ForeignUseObserved(fake.now, "n", 0, 0, 0))
    assert idle["n"] == since + 7
    fake.lose_node("n")
    assert "n" not in idle


JOBS = st.lists(
    st.tuples(
        st.sampled_from([0.25, 0.5, 1, 2, 4, 8]),
        st.integers(1, 3),
        st.sampled_from([(), ("A",), ("B", "A")]),
        st.integers(0, 2),
    ),
    max_size=14,
)
TYPES = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 4), st.sampled_from(["A", "B", ""])), max_size=3
)


@settings(deadline=None)
@given(TYPES, JOBS, st.lists(st.sampled_from([2, 4, 8]), max_size=2), st.integers(0, 3))
def test_never_more_than_can_be_launched_each_job_once_and_the_same_again(types, jobs, up, booting) -> None:
    shapes = [shape(f"t{n}", gpus, most, kind) for n, (gpus, most, kind) in enumerate(types)]

    def play() -> FakeCluster:
        fake = cluster(*shapes)
        boots = tuple((each.name, min(booting, each.most)) for each in shapes)
        fake.happen(LaunchesObserved(0, (), boots))
        for number, gpus in enumerate(up):
            fake.add_node(f"n{number}", gpus)
        for gpus, count, kinds, priority in jobs:
            fake.submit(gpus, count=count if gpus >= 1 else 1, gpu_types=kinds, priority=priority)
        return fake

    fake = play()
    wanted = fake.state.launches.wanted
    most = {each.name: each.most for each in shapes}
    assert all(count <= most[name] for name, count in wanted.nodes().items())
    served = [job_id for ask in wanted.asks for job_id in ask.jobs]
    assert len(served) == len(set(served))
    assert set(served) == set(wanted.wants)
    assert all(fake.state.jobs[job_id].attempt is None for job_id in served), "who starts asks for nothing"
    units = sum(fake.state.jobs[job_id].gang.gpu_units for job_id in served)
    kept = sum(units for ask in wanted.asks for _, units in ask.kept)
    sizes = {each.name: each.gpu_slots * 10_000 for each in shapes}
    assert units <= kept + sum(sizes[name] * count for name, count in wanted.nodes().items())
    for ask in wanted.asks:
        assert ask.node_types, "nothing is asked where nothing is to come"
        for job_id in ask.jobs:
            kinds = fake.state.jobs[job_id].gang.gpu_types
            want = wanted.wants[job_id]
            assert not kinds or want.gpu_type in kinds
            assert set(want.node_types) <= set(ask.node_types)
    assert play().state.launches.wanted == wanted
    for job_id in list(fake.state.jobs):
        fake.cancel(job_id)
    assert not fake.state.launches.wanted.asks
