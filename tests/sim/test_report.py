"""The figures of hand-made replays, with the arithmetic beside them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.sim.cluster import parse_nodes
from rm.sim.fairness import equal_share_jct_s, finish_time_ratios, jains_index, tenants_index
from rm.sim.outcomes import JobOutcome, Replay, Run, Sample
from rm.sim.report import figures_of, figures_table, quantile
from rm.sim.timeline import timeline_of
from rm.sim.trace import TraceJob
from rm.tables import console

ONE_NODE = parse_nodes("1", 8)
A = TraceJob("a", 0, 100, 8, queue="x", user="u")
B = TraceJob("b", 10, 50, 4, queue="y", user="v")
REPLAY = Replay(
    "by hand",
    ONE_NODE,
    [
        JobOutcome(A, (Run(0, 20, 8), Run(80, 180, 8)), lost_gpu_s=160),
        JobOutcome(B, (Run(20, 70, 4),)),
    ],
)


def test_the_figures_of_a_small_replay() -> None:
    figures = figures_of(REPLAY)
    assert (figures.policy, figures.jobs, figures.preemptions) == ("by hand", 2, 1)
    assert figures.mean_jct_s == (180 + 60) / 2
    assert figures.mean_queue_s == (60 + 10) / 2
    assert figures.max_queue_s == 60
    assert figures.p99_jct_s == pytest.approx(60 + 0.99 * 120)
    assert figures.makespan_s == 180
    assert figures.utilisation == pytest.approx((120 * 8 + 50 * 4) / (180 * 8))
    assert figures.gpu_seconds_lost == 160
    assert figures.node_hours == 0
    # Equal shares: a alone until 10; then 4 GPUs each until b ends at 60; a has done 10 + 25 of its 100 s, ends at 125.
    assert equal_share_jct_s([A, B], ONE_NODE) == pytest.approx({"a": 125, "b": 50})
    assert figures.worst_ftr == pytest.approx(180 / 125)
    assert figures.mean_ftr == pytest.approx((180 / 125 + 60 / 50) / 2)
    assert figures.jain == pytest.approx(jains_index([125 / 180, 50 / 60]))
    assert "by hand" in _printed(figures_table([figures]))


def test_the_timeline_follows_from_the_runs() -> None:
    assert [tuple(sample) for sample in timeline_of(REPLAY)] == [
        (0, 8, 8, 0, {"x": 8, "y": 0}),
        (10, 8, 8, 1, {"x": 8, "y": 0}),
        (20, 4, 8, 1, {"x": 0, "y": 4}),
        (70, 0, 8, 1, {"x": 0, "y": 0}),
        (80, 8, 8, 0, {"x": 8, "y": 0}),
        (180, 0, 8, 0, {"x": 0, "y": 0}),
    ]


def test_a_cluster_that_grows_is_measured_by_what_was_there() -> None:
    timeline = [Sample(0, 8, 8, 0, {}), Sample(100, 8, 16, 0, {}), Sample(500, 0, 0, 0, {})]
    replay = Replay("grown", ONE_NODE, REPLAY.outcomes, timeline, node_hours=0.5)
    figures = figures_of(replay)
    assert figures.utilisation == pytest.approx((120 * 8 + 50 * 4) / (100 * 8 + 80 * 16))
    assert figures.node_hours == 0.5


def test_short_jobs_count_as_ten_seconds() -> None:
    job = TraceJob("s", 0, 1, 1)
    ratios = finish_time_ratios([JobOutcome(job, (Run(29, 30, 1),))], equal_share_jct_s([job], ONE_NODE))
    assert ratios == {"s": 3}


def test_tenants_are_queues_or_else_users() -> None:
    jobs = [
        TraceJob("a", 0, 1, 1, user="u"),
        TraceJob("b", 0, 1, 1, user="v"),
        TraceJob("c", 0, 1, 1, user="v"),
    ]
    assert tenants_index(jobs, {"a": 1, "b": 2, "c": 4}) == pytest.approx(jains_index([1, 1 / 3]))
    assert jains_index([1, 1, 1]) == 1
    assert jains_index([1, 0, 0, 0]) == 0.25


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 100), st.sampled_from([0.5, 1, 2, 8, 16])), min_size=1)
)
@settings(deadline=None)
def test_an_equal_share_wastes_nothing_and_is_no_faster_than_alone(
    rows: list[tuple[float, float, float]],
) -> None:
    jobs = sorted(
        (TraceJob(f"t{number}", *row) for number, row in enumerate(rows)), key=lambda job: job.submit_s
    )
    jcts = equal_share_jct_s(jobs, parse_nodes("2", 8))
    assert all(jcts[job.job_id] >= job.duration_s - 1e-6 for job in jobs)
    last = max(job.submit_s + jcts[job.job_id] for job in jobs)
    alone = max(job.submit_s + job.duration_s for job in jobs)
    assert last <= alone + sum(job.gpu_seconds for job in jobs) / 16 + 1e-6


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
@settings(deadline=None)
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    numpy = pytest.importorskip("numpy")
    assert quantile(sorted(values), share) == pytest.approx(float(numpy.quantile(values, share)), abs=1e-6)


def _printed(table: object) -> str:
    screen = console()
    with screen.capture() as captured:
        screen.print(table)
    return captured.get()
