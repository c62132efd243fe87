"""Estimates of a start: the core run forward on what is known of durations."""

from __future__ import annotations

from rm.core.forecast import Twin
from rm.core.model import GPU_TYPE, Status
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
