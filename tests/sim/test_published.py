"""The event-driven policies give what the rules give when played second by second, job for job."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from second_by_second import play

from rm.errors import Infeasible, InvalidSpec
from rm.sim.cluster import Pool, SimCluster, parse_nodes
from rm.sim.consolidation import ConsolidatedNodes
from rm.sim.outcomes import JobOutcome
from rm.sim.policies import POLICIES, policy_named
from rm.sim.trace import TraceJob

TICKED = ("fifo", "sjf", "srtf", "tiresias", "fifo+skip", "sjf+skip")
GANGS = st.sampled_from([1, 1, 1, 2, 3, 4, 8, 12, 16, 24])


def workload(rows: list[tuple[int, int, int]]) -> list[TraceJob]:
    """Jobs of (seconds since the one before, seconds, GPUs)."""
    at, jobs = 0, []
    for number, (gap, seconds, gpus) in enumerate(rows):
        at += gap
        jobs.append(TraceJob(f"t{number}", at, seconds, gpus))
    return jobs


def starts_and_end(outcomes: list[JobOutcome]) -> dict[str, tuple[tuple[float, ...], float]]:
    return {each.job.job_id: (tuple(run.start_s for run in each.runs), each.end_s) for each in outcomes}


@pytest.mark.parametrize("policy", TICKED)
@given(rows=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 300), GANGS), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_as_if_every_second_were_looked_at(policy: str, rows: list[tuple[int, int, int]]) -> None:
    jobs = workload(rows)
    replay = policy_named(policy).replay(jobs, parse_nodes("3", 8))
    assert starts_and_end(list(replay.outcomes)) == play(policy, jobs, nodes=3, per_node=8)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", TICKED)
def test_the_same_under_load(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    jobs = workload(
        [
            (rng.choice([0, 0, 1, 20]), rng.choice([1, 30, 60, 400]), rng.choice([1, 2, 3, 8, 12, 16, 20]))
            for _ in range(120)
        ]
    )
    replay = policy_named(policy).replay(jobs, parse_nodes("3", 8))
    assert starts_and_end(list(replay.outcomes)) == play(policy, jobs, nodes=3, per_node=8)


def test_jobs_that_cross_the_tiresias_split_give_way() -> None:
    rng = random.Random(5)
    jobs = workload(
        [(rng.randrange(400), rng.choice([100, 1_000, 5_000]), rng.choice([4, 8, 12])) for _ in range(60)]
    )
    replay = policy_named("tiresias").replay(jobs, parse_nodes("2", 8))
    assert starts_and_end(list(replay.outcomes)) == play("tiresias", jobs, nodes=2, per_node=8)
    assert sum(each.preemptions for each in replay.outcomes) > 0


def test_a_preemption_costs_a_restart_and_says_so() -> None:
    jobs = [TraceJob("long", 0, 1_000, 8), TraceJob("short", 100, 50, 8)]
    long, short = sorted(
        policy_named("srtf").replay(jobs, parse_nodes("1", 8)).outcomes, key=lambda o: o.job.job_id
    )
    assert (short.first_start_s, short.end_s) == (100, 151)  # a second later than its work
    assert [(run.start_s, run.end_s) for run in long.runs] == [(0, 100), (151, 151 + 900 + 40 + 1)]
    assert (long.preemptions, long.lost_gpu_s, long.queue_s) == (1, 320, 51)


def test_the_first_that_does_not_fit_blocks_unless_skipped() -> None:
    jobs = workload([(0, 100, 4), (1, 100, 8), (1, 10, 2)])
    starts = {name: starts_and_end(list(policy_named(name).replay(jobs, parse_nodes("1", 8)).outcomes))
              for name in ("fifo", "fifo+skip")}  # fmt: skip
    assert starts["fifo"]["t2"] == ((200,), 210)
    assert starts["fifo+skip"]["t2"] == ((2,), 12)


def test_queues_with_nodes_of_their_own_do_not_share_them() -> None:
    jobs = [
        TraceJob("a", 0, 100, 8, queue="x"),
        TraceJob("b", 1, 100, 8, queue="x"),
        TraceJob("c", 2, 10, 8, queue="y"),
    ]
    ends = starts_and_end(list(policy_named("fifo").replay(jobs, parse_nodes("x=1,y=1", 8)).outcomes))
    assert ends == {"a": ((0,), 100), "b": ((100,), 200), "c": ((2,), 12)}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_can_never_run_is_said_first(policy: str) -> None:
    with pytest.raises(
        Infeasible, match=r"job big needs 24 GPUs, the cluster has 16 .*3 nodes would hold it"
    ):
        policy_named(policy).replay([TraceJob("big", 0, 1, 24)], parse_nodes("2", 8))
    with pytest.raises(InvalidSpec, match="queue 'z' of job lost has no nodes"):
        policy_named(policy).replay([TraceJob("lost", 0, 1, 1, queue="z")], parse_nodes("x=1,y=1", 8))


@pytest.mark.parametrize("policy", POLICIES)
def test_fractions_are_rounded_up_and_progress_is_told(policy: str) -> None:
    told: list[int] = []
    jobs = [TraceJob("half", 0.5, 0.2, 0.5), TraceJob("next", 0.7, 10.5, 1)]
    replay = policy_named(policy).replay(jobs, parse_nodes("1", 1), told.append)
    assert told == [1, 2]
    for each in replay.outcomes:
        assert each.queue_s >= -1e-9
        assert each.held_s >= each.job.duration_s - 1e-9
        assert each.runs[0].gpus == each.job.num_gpus


@given(st.lists(st.integers(1, 40), max_size=60), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_free_gpus_add_up_and_nodes_are_not_oversubscribed(sizes: list[int], rng: random.Random) -> None:
    nodes, held = ConsolidatedNodes(Pool("", 4, 8)), []
    for gpus in sizes:
        placed = nodes.place(gpus)
        if placed:
            assert sum(share.gpus for share in placed) == gpus
            assert len(placed) == -(-gpus // 8)
            held.append(placed)
        per_node = [sum(s.gpus for p in held for s in p if s.node == node) for node in range(4)]
        assert max(per_node) <= 8
        assert nodes.free == 32 - sum(per_node)
        if held and rng.random() < 0.4:
            nodes.release(held.pop(rng.randrange(len(held))))


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "x", "a=", "=3", "a=1,b", "a=1,a=2", "1,2", "3,a=1", "1.5", "9" * 12]
)
def test_nonsense_for_nodes(text: str) -> None:
    with pytest.raises(InvalidSpec):
        parse_nodes(text, 8)


def test_nodes() -> None:
    assert parse_nodes(" 47 ", 8) == SimCluster((Pool("", 47, 8),))
    assert parse_nodes("vcvGl=20, vcvlY=2", 8).gpus == 176
