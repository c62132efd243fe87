"""Estimates of a start: the core run forward on what is known of durations."""

from __future__ import annotations

import pytest

from rm.core.events import LaunchesObserved, LaunchFailed, NodeTypesObserved
from rm.core.forecast import Twin
from rm.core.model import GPU_TYPE, NodeShape, Status
from rm.core.policy import Policy
from rm.testing import Behaviour, FakeCluster


def waiting(fake: FakeCluster, job: str) -> float | None:
    return Twin(fake.state, fake.now).forecast(job).p50_s


def test_by_time_limits_where_there_is_no_history() -> None:
    fake = FakeCluster()
    fake.add_node("n", 1)
    fake.submit(1, time_limit_s=100.0, behaviour=Behaviour(1000))
    second = fake.submit(1, time_limit_s=50.0)
    third = fake.submit(1)
    fake.run(lambda: fake.state.jobs["j1"].status is Status.RUNNING)
    first_wait, second_wait = waiting(fake, second), waiting(fake, third)
    assert first_wait is not None
    assert second_wait is not None
    assert 99 <= first_wait <= 101
    assert 149 <= second_wait <= 151


def test_by_history_median_and_tail() -> None:
    fake = FakeCluster()
    fake.add_node("n", 1)
    for duration in (10, 10, 10, 10, 10, 10, 10, 10, 10, 100):
        fake.submit(1, behaviour=Behaviour(duration), name="train")
    fake.run()
    fake.submit(1, behaviour=Behaviour(1000), name="train")
    job = fake.submit(1)
    fake.run(lambda: fake.state.jobs["j11"].status is Status.RUNNING)
    forecast = Twin(fake.state, fake.now).forecast(job)
    assert forecast.p50_s is not None
    assert forecast.p90_s is not None
    assert 9 <= forecast.p50_s <= 11
    assert 95 <= forecast.p90_s <= 101


def test_without_a_basis_it_says_so_and_of_whom() -> None:
    fake = FakeCluster()
    fake.add_node("n", 1)
    fake.submit(1, behaviour=Behaviour(1000))
    job = fake.submit(1)
    fake.run(lambda: fake.state.jobs["j1"].status is Status.RUNNING)
    forecast = Twin(fake.state, fake.now).forecast(job)
    # Nothing is known of j1, but that it runs already is something.
    assert forecast.p50_s is None or forecast.p50_s < 10
    assert forecast.basis


def test_a_forecast_leaves_the_state_as_it_was() -> None:
    fake = FakeCluster()
    fake.add_node("n", 2)
    fake.submit(2, time_limit_s=100.0, behaviour=Behaviour(1000))
    job = fake.submit(1, time_limit_s=1.0)
    fake.run(lambda: fake.state.jobs["j1"].status is Status.RUNNING)
    before = dict(fake.state.jobs), fake.state.version, fake.state.predictor.predict(fake.state.jobs[job])
    Twin(fake.state, fake.now).forecast(job)
    assert (dict(fake.state.jobs), fake.state.version) == before[:2]
    assert fake.state.predictor.predict(fake.state.jobs[job]) == before[2]
    fake.check()


def test_it_says_which_of_several_types_comes_first() -> None:
    fake = FakeCluster()
    fake.add_node("h", 1, **{GPU_TYPE: "H100"})
    fake.add_node("a", 1, **{GPU_TYPE: "A100"})
    fake.submit(1, gpu_types=("H100",), time_limit_s=500.0, behaviour=Behaviour(1000))
    fake.submit(1, gpu_types=("A100",), time_limit_s=100.0, behaviour=Behaviour(1000))
    job = fake.submit(1, gpu_types=("H100", "A100"))
    only = fake.submit(1, gpu_types=("H100",))
    fake.run(lambda: fake.state.jobs["j2"].status is Status.RUNNING)
    first, second = Twin(fake.state, fake.now).forecast(job), Twin(fake.state, fake.now).forecast(only)
    assert first.p50_s is not None
    assert 99 <= first.p50_s <= 101
    assert (first.gpu_type, second.gpu_type) == ("A100", None)


# --- nodes that are not there yet -----------------------------------------------------------------------------


def launching(most: int = 1, prices: dict[str, float] | None = None, up: int = 1) -> FakeCluster:
    """A node of one GPU that runs a job for 1000 s more, and a type of which more could come: none has yet."""
    fake = FakeCluster(policy=Policy(boot_s=240.0, boot_timeout_s=900.0, prices=prices or {}))
    for number in range(1, up + 1):
        fake.add_node(f"a100-{number}", 1)
    fake.add_node("head", 0)
    fake.happen(NodeTypesObserved(0, (NodeShape(1, 8_000, 2**36, (), most, "g5.2xlarge"),)))
    for _ in range(up):
        fake.submit(1, time_limit_s=1000.0, behaviour=Behaviour(10_000))
    fake.run(lambda: all(job.status is Status.RUNNING for job in fake.state.jobs.values()))
    return fake


def test_wait_or_pay() -> None:
    fake = launching(prices={"g5.2xlarge": 1.5})
    job = fake.submit(1)
    forecast = Twin(fake.state, fake.now).forecast(job)
    assert (forecast.p50_s, forecast.p90_s) == (240, 900), "no boot of the type was seen yet"
    assert (forecast.nodes, forecast.new_nodes, forecast.price) == ((), ("g5.2xlarge",), 1.5)
    assert forecast.wait_s is not None
    assert 1000 <= forecast.wait_s <= 1001
    assert forecast.wait_nodes == ("a100-1",)


def test_without_an_end_in_sight_only_the_new_node_is_told_of_and_without_a_price_none() -> None:
    fake = launching(up=0)
    job = fake.submit(1)
    forecast = Twin(fake.state, fake.now).forecast(job)
    assert (forecast.p50_s, forecast.new_nodes, forecast.price) == (240, ("g5.2xlarge",), None)
    assert (forecast.wait_s, forecast.wait_nodes) == (None, ())


def test_who_comes_second_waits_for_what_runs() -> None:
    fake = launching()
    fake.submit(1, time_limit_s=5000.0)
    job = fake.submit(1)
    forecast = Twin(fake.state, fake.now).forecast(job)
    assert forecast.p50_s is not None
    assert 1000 <= forecast.p50_s <= 1001, "the one new node is the first's"
    assert (forecast.nodes, forecast.new_nodes, forecast.wait_s) == (("a100-1",), (), None)


def test_a_boot_under_way_counts_from_its_beginning_and_by_what_boots_have_taken() -> None:
    fake = launching(most=3)
    first = fake.submit(1, behaviour=Behaviour(10_000), time_limit_s=20_000.0)
    asked = fake.now
    fake.happen(LaunchesObserved(fake.now, (), (("g5.2xlarge", 1),)))
    fake.now = asked + 100
    assert waiting(fake, first) == pytest.approx(140)
    fake.add_node("b1", 1)
    fake.happen(LaunchesObserved(fake.now, (("g5.2xlarge", 1),), ()))
    second = fake.submit(1)
    forecast = Twin(fake.state, fake.now).forecast(second)
    assert (forecast.p50_s, forecast.p90_s) == (pytest.approx(100), pytest.approx(100)), (
        "as long as the last boot took"
    )
    fake.happen(LaunchesObserved(fake.now, (("g5.2xlarge", 1),), (("g5.2xlarge", 1),)))
    fake.now += 150
    assert waiting(fake, second) == pytest.approx(750), (
        "no boot took as long: it has until it counts as failed"
    )


def test_a_type_in_a_pause_brings_nothing() -> None:
    fake = launching()
    job = fake.submit(1)
    fake.happen(LaunchFailed(fake.now, "g5.2xlarge", "none left"))
    forecast = Twin(fake.state, fake.now).forecast(job)
    assert (forecast.new_nodes, forecast.nodes) == ((), ("a100-1",))


def test_a_gang_on_what_is_up_and_on_what_comes() -> None:
    fake = launching(most=2, prices={"g5.2xlarge": 1.5})
    fake.add_node("a100-2", 1)
    job = fake.submit(1, count=3)
    forecast = Twin(fake.state, fake.now).forecast(job)
    assert (forecast.p50_s, forecast.nodes) == (240, ("a100-2",))
    assert (forecast.new_nodes, forecast.price) == (("g5.2xlarge", "g5.2xlarge"), 3.0)
    assert forecast.wait_s is None
