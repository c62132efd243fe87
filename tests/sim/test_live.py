"""Our scheduler on the virtual clock: nothing is lost or charged twice, and it agrees with the published rules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.core.policy import ANY, Policy, Preempt, QueuePolicy
from rm.core.resources import GPU_UNIT
from rm.errors import Infeasible, InvalidSpec
from rm.sim.cluster import SimCluster, parse_nodes
from rm.sim.live import LivePolicy, World, gang_of
from rm.sim.outcomes import JobOutcome, Replay
from rm.sim.policies import POLICIES, policy_named
from rm.sim.report import figures_of
from rm.sim.timeline import capacity_gpu_s, timeline_of
from rm.sim.trace import TraceJob

OURS = tuple(name for name, policy in POLICIES.items() if isinstance(policy, LivePolicy))
WORLD = World(checkpoint_s=50, restart_s=5, boot_s=30, idle_s=40)


def two_queues(share: int) -> Policy:
    """Each owns `share` GPUs, may borrow, and takes back what is its own; priorities count inside a queue."""
    own = {ANY: share * GPU_UNIT}
    return Policy(
        queues={name: QueuePolicy(name, nominal=own, preempt=Preempt.LOWER) for name in "ab"},
        default_queue="a",
    )


def workload(
    seed: int, count: int = 150, sizes: Sequence[float] = (0.5, 1, 1, 2, 3, 4, 8, 12, 16)
) -> list[TraceJob]:
    rng = random.Random(seed)
    at, jobs = 0.0, []
    for number in range(count):
        at += rng.choice((0, 0, 1, 5, 60))
        jobs.append(
            TraceJob(
                f"t{number}",
                at,
                rng.choice((0, 1, 7, 60, 200, 500)),
                rng.choice(sizes),
                user=rng.choice("uvw"),
                queue=rng.choice("aab"),
                priority=rng.choice((0, 0, 100)),
            )
        )
    return jobs


def check_conserved(replay: Replay, jobs: Sequence[TraceJob]) -> None:
    """Every GPU-second of the cluster was exactly one of useful, lost and idle, at every moment."""
    assert sorted(each.job.job_id for each in replay.outcomes) == sorted(job.job_id for job in jobs)
    for each in replay.outcomes:
        useful, held = each.job.gpu_seconds, each.held_s * each.job.num_gpus
        assert held == pytest.approx(useful + each.lost_gpu_s, abs=1e-6)
        assert each.runs[0].start_s >= each.job.submit_s
        assert all(before.end_s <= after.start_s for before, after in pairwise(each.runs))
    samples = timeline_of(replay)
    for sample in samples:
        assert -1e-9 <= sample.busy_gpus <= sample.total_gpus + 1e-9, "more GPUs held than there are"
        assert sample.waiting >= 0
    start_s, end_s = samples[0].at_s, samples[-1].at_s
    spans = [(sample, after.at_s - sample.at_s) for sample, after in pairwise(samples)]
    idle = sum((sample.total_gpus - sample.busy_gpus) * span for sample, span in spans)
    useful = sum(job.gpu_seconds for job in jobs)
    lost = sum(each.lost_gpu_s for each in replay.outcomes)
    assert capacity_gpu_s(replay, start_s, end_s) == pytest.approx(useful + lost + idle)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", OURS)
def test_every_gpu_second_is_one_thing(policy: str, seed: int) -> None:
    jobs = workload(seed)
    check_conserved(policy_named(policy).replay(jobs, parse_nodes("3", 8)), jobs)


@pytest.mark.parametrize("seed", range(4))
def test_evictions_lose_what_no_checkpoint_holds(seed: int) -> None:
    jobs = workload(seed, sizes=(1, 2, 4, 8, 12))
    policy = LivePolicy("two", "", two_queues(12), WORLD)
    replay = policy.replay(jobs, parse_nodes("3", 8))
    check_conserved(replay, jobs)
    evicted = [each for each in replay.outcomes if each.preemptions]
    assert evicted, "this workload must make somebody give way"
    for each in evicted:
        most = each.preemptions * (WORLD.checkpoint_s + 2 * WORLD.restart_s) * each.job.num_gpus
        # A later run begins with a restart, or is evicted in it.
        restarts_s = sum(min(WORLD.restart_s, run.end_s - run.start_s) for run in each.runs[1:])
        assert restarts_s * each.job.num_gpus <= each.lost_gpu_s <= most


@pytest.mark.parametrize("seed", range(10))
def test_nobody_takes_turns_in_evicting_others(seed: int) -> None:
    """An eviction changes who comes first. Without care, two jobs evict each other once a second from then on."""
    policy = LivePolicy("two", "", two_queues(12), WORLD)
    replay = policy.replay(workload(seed), parse_nodes("3", 8))
    assert max(each.preemptions for each in replay.outcomes) < 10


def test_one_eviction_by_hand() -> None:
    jobs = [
        TraceJob("borrower", 0, 1_000, 8, queue="a"),
        TraceJob("owner", 130, 100, 4, queue="b"),
    ]
    policy = LivePolicy("two", "", two_queues(4), WORLD)
    borrower, owner = sorted(
        policy.replay(jobs, parse_nodes("1", 8)).outcomes, key=lambda each: each.job.job_id
    )
    assert [(run.start_s, run.end_s) for run in owner.runs] == [(130, 230)]
    # Two checkpoints, at 50 and 100, are kept of 130 s; then 5 s of restart and the 900 s that are left.
    assert [(run.start_s, run.end_s) for run in borrower.runs] == [(0, 130), (230, 230 + 5 + 900)]
    assert borrower.lost_gpu_s == (30 + 5) * 8


def test_a_second_eviction_before_the_restart_has_paid() -> None:
    jobs = [
        TraceJob("borrower", 0, 300, 8, queue="a"),
        TraceJob("first", 60, 10, 4, queue="b"),
        TraceJob("second", 73, 10, 4, queue="b"),
    ]
    world = replace(WORLD, restart_s=20)
    replay = LivePolicy("two", "", two_queues(4), world).replay(jobs, parse_nodes("1", 8))
    borrower = next(each for each in replay.outcomes if each.job.job_id == "borrower")
    # 50 of 60 s are kept; the 3 s from 70 on were restart; from 83 on: restart, and the 250 s that are left.
    assert [(run.start_s, run.end_s) for run in borrower.runs] == [(0, 60), (70, 73), (83, 83 + 20 + 250)]
    assert borrower.lost_gpu_s == (10 + 3 + 20) * 8
    check_conserved(replay, jobs)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("ours", "published"), [("rm-fifo", "fifo"), ("kueue", "fifo+skip")])
def test_the_published_rules_on_whole_nodes(ours: str, published: str, seed: int) -> None:
    jobs = [
        replace(job, priority=0, duration_s=job.duration_s + 1)
        for job in workload(seed, sizes=(1, 2, 4, 8, 16, 24))
    ]
    whole = [replace(job, num_gpus=max(8, job.num_gpus)) for job in jobs]
    cluster = parse_nodes("4", 8)
    assert _ends(policy_named(ours).replay(whole, cluster)) == _ends(
        policy_named(published).replay(whole, cluster)
    )
    # Smaller jobs too: both put them on the fullest node that fits.
    mine, theirs = (figures_of(policy_named(name).replay(jobs, cluster)) for name in (ours, published))
    assert mine.mean_jct_s == pytest.approx(theirs.mean_jct_s, rel=0.01)


@pytest.mark.parametrize("policy", OURS)
def test_twice_the_same(policy: str) -> None:
    jobs, cluster = workload(7), parse_nodes("a=2,b=3", 8)
    first, second = (policy_named(policy).replay(jobs, cluster) for _ in range(2))
    assert first == second


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 30),
            st.integers(0, 300),
            st.sampled_from([0.3, 1, 2, 5, 8, 16]),
            st.sampled_from("ab"),
        ),
        min_size=1,
        max_size=30,
    ),
    grows=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_workload_ends_and_is_conserved(rows: list[tuple[int, int, float, str]], *, grows: bool) -> None:
    at, jobs = 0, []
    for number, (gap, seconds, gpus, queue) in enumerate(rows):
        at += gap
        jobs.append(TraceJob(f"t{number}", at, seconds, gpus, queue=queue))
    cluster = parse_nodes("1:3", 8, grows=True) if grows else parse_nodes("3", 8)
    replay = LivePolicy("two", "", two_queues(8), WORLD).replay(jobs, cluster)
    check_conserved(replay, jobs)


def test_queues_stay_on_their_own_nodes() -> None:
    jobs = [
        TraceJob("a1", 0, 100, 8, queue="a"),
        TraceJob("a2", 1, 100, 8, queue="a"),
        TraceJob("b1", 2, 10, 16, queue="b"),
    ]
    ends = _ends(policy_named("rm-default").replay(jobs, parse_nodes("a=1,b=2", 8)))
    assert ends == {"a1": 100, "a2": 200, "b1": 12}


def test_gpu_types_are_met_in_their_order() -> None:
    cluster = parse_nodes("1:A100,1:H100", 8)
    jobs = [
        TraceJob("h", 0, 100, 8, gpu_type="H100"),
        TraceJob("either", 1, 100, 8, gpu_type="H100|A100"),
        TraceJob("a", 2, 100, 8, gpu_type="A100"),
        TraceJob("any", 3, 5, 1),
    ]
    ends = _ends(policy_named("kueue").replay(jobs, cluster))
    assert ends == {"h": 100, "either": 101, "a": 201, "any": 105}
    with pytest.raises(
        Infeasible, match="job v: no node of this cluster has a GPU of type V100; it has A100, H100"
    ):
        policy_named("kueue").replay([TraceJob("v", 0, 1, 1, gpu_type="V100")], cluster)
    assert gang_of(TraceJob("v", 0, 1, 1, gpu_type="V100"), parse_nodes("1", 8)).gpu_types == ()


def test_shares_of_one_device() -> None:
    jobs = [TraceJob(f"half{number}", number, 10, 0.5) for number in range(3)]
    replay = policy_named("rm-fifo").replay(jobs, parse_nodes("1", 1))
    assert _ends(replay) == {"half0": 10, "half1": 11, "half2": 20}
    check_conserved(replay, jobs)


def test_a_time_limit_ends_a_job() -> None:
    jobs = [TraceJob("long", 0, 500, 8, time_limit_s=100), TraceJob("next", 1, 10, 8)]
    assert _ends(policy_named("rm-default").replay(jobs, parse_nodes("1", 8))) == {"long": 100, "next": 110}


def test_a_growing_cluster_by_hand() -> None:
    jobs = [TraceJob("one", 0, 100, 8), TraceJob("two", 10, 100, 16), TraceJob("late", 1_000, 10, 8)]
    cluster = parse_nodes("1:3", 8, grows=True)
    replay = LivePolicy("r", "", policy_named("rm-default").rules, WORLD).replay(jobs, cluster)  # type: ignore[attr-defined]
    # `two` has 2 nodes launched at 10, up at 40. They end at 140; the node of `one` is idle since 100, and the first
    # to leave, also at 140; of the others one leaves 40 s after its job, at 180, and one stays.
    assert _ends(replay) == {"one": 100, "two": 140, "late": 1_010}
    assert [(at, gpus) for at, gpus in _sizes(replay)] == [(0, 8), (40, 24), (140, 16), (180, 8)]
    assert replay.node_hours == pytest.approx((2 * 130 + 40) / 3600)
    check_conserved(replay, jobs)


def test_nothing_there_at_first() -> None:
    jobs = [TraceJob("gang", 5, 100, 24)]
    replay = LivePolicy("r", "", Policy(queues={}), WORLD).replay(jobs, parse_nodes("0:3", 8, grows=True))
    assert _ends(replay) == {"gang": 5 + WORLD.boot_s + 100}
    assert replay.node_hours == pytest.approx(3 * 130 / 3600)


def test_what_never_starts_is_said_with_the_reason() -> None:
    policy = LivePolicy(
        "capped", "", Policy(queues={"a": QueuePolicy("a", max_gpus_per_owner=GPU_UNIT)}, default_queue="a")
    )
    with pytest.raises(
        Infeasible, match=r"capped: job big of queue a never starts \(ExceedsQuota: .*1 of 2 jobs"
    ):
        policy.replay(
            [TraceJob("small", 0, 1, 1, queue="a"), TraceJob("big", 0, 1, 2, queue="a")], parse_nodes("1", 8)
        )
    with pytest.raises(InvalidSpec, match="jobs of the trace are in 'z', which is no queue"):
        policy.replay([TraceJob("lost", 0, 1, 1, queue="z")], parse_nodes("1", 8))


def _ends(replay: Replay) -> dict[str, float]:
    outcomes: Sequence[JobOutcome] = replay.outcomes
    return {each.job.job_id: each.end_s for each in outcomes}


def _sizes(replay: Replay) -> list[tuple[float, float]]:
    """The moments at which the number of GPUs changed."""
    sizes: list[tuple[float, float]] = []
    for sample in timeline_of(replay):
        if not sizes or sizes[-1][1] != sample.total_gpus:
            sizes.append((sample.at_s, sample.total_gpus))
    return sizes


def test_a_cluster_says_what_it_is() -> None:
    assert parse_nodes("1:3", 8, grows=True).grows
    assert not parse_nodes("3", 8).grows
    assert parse_nodes("3:A100,2:V100", 8).typed
    cluster: SimCluster = parse_nodes("a=1:A100,a=2:V100,b=1:A100", 8)
    assert [(pool.name, pool.nodes) for pool, _ in cluster.split([])] == [("a", 3), ("b", 1)]
    for nonsense in ("2:1", "1:", ":2", "1:2:", "a=1:2,3:4", "0:0"):
        with pytest.raises(InvalidSpec):
            parse_nodes(nonsense, 8, grows=True)
