"""The core on a fake cluster: jobs in, decisions out, no Ray and no waiting."""

from __future__ import annotations

import pytest

from rm.core import reasons
from rm.core.cycle import schedule, why
from rm.core.events import (
    ForeignUseObserved,
    JobAdmitted,
    JobSubmitted,
    NodeJoined,
    PlacementReady,
    RunExited,
    RunStarted,
)
from rm.core.model import Kind, Outcome, Status, Strategy
from rm.core.policy import Policy, Preempt, QueuePolicy
from rm.core.resources import GPU_UNIT
from rm.core.state import ClusterState
from rm.errors import InvalidTransition
from rm.testing import Behaviour, FakeCluster


def cluster(*gpus: int) -> FakeCluster:
    fake = FakeCluster()
    for number, count in enumerate(gpus):
        fake.add_node(f"n{number}", count)
    return fake


def status(fake: FakeCluster, job_id: str) -> Status:
    return fake.ended[job_id].status if job_id in fake.ended else fake.state.jobs[job_id].status


def test_the_main_job_one_waits_for_the_other() -> None:
    fake = cluster(2)
    first, second = fake.submit(2), fake.submit(2)
    fake.run(lambda: status(fake, first) is Status.RUNNING)
    assert status(fake, second) is Status.QUEUED
    reason = fake.state.jobs[second].reason
    assert reason is not None
    assert reason.code == reasons.WAITING_FOR_CAPACITY
    assert reason.evidence["free_gpus"] == 0
    fake.run()
    assert status(fake, first) is status(fake, second) is Status.SUCCEEDED
    assert fake.state.totals().charged == 0
    admitted = [e.job_id for e in fake.history if isinstance(e, JobAdmitted)]
    assert admitted == [first, second]


def test_gpus_stay_charged_until_the_release_is_seen() -> None:
    fake = cluster(1)
    first, second = fake.submit(1), fake.submit(1)
    fake.run(lambda: status(fake, first) is Status.STOPPING)
    assert fake.state.totals().charged == GPU_UNIT
    assert status(fake, second) is Status.QUEUED
    fake.run()
    assert status(fake, second) is Status.SUCCEEDED


def test_priority_goes_first_and_order_is_otherwise_submission() -> None:
    fake = cluster(1)
    fake.submit(1)
    low, normal, high = fake.submit(1, priority=-100), fake.submit(1), fake.submit(1, priority=100)
    fake.run()
    admitted = [e.job_id for e in fake.history if isinstance(e, JobAdmitted)][1:]
    assert admitted == [high, normal, low]


def test_nobody_overtakes_the_first_blocked_job() -> None:
    fake = cluster(4)
    running = fake.submit(3)
    big = fake.submit(4)
    small = fake.submit(1)
    fake.run(lambda: status(fake, running) is Status.RUNNING)
    assert status(fake, small) is Status.QUEUED
    reason = why(fake.state, fake.state.jobs[small], fake.now)
    assert reason.code == reasons.RESERVED
    assert reason.evidence["for"] == big
    fake.run()
    assert set(fake.ended) == {running, big, small}


def test_an_infeasible_job_blocks_nobody_and_starts_when_a_node_joins() -> None:
    fake = cluster(2)
    big, small = fake.submit(4), fake.submit(1)
    fake.run()
    assert status(fake, small) is Status.SUCCEEDED
    assert why(fake.state, fake.state.jobs[big], fake.now).code == reasons.INFEASIBLE
    fake.add_node("n9", 4)
    fake.run()
    assert status(fake, big) is Status.SUCCEEDED


def test_a_blocked_job_keeps_only_the_nodes_that_it_could_use() -> None:
    fake = FakeCluster()
    fake.add_node("a", 2, **{"ray.io/accelerator-type": "A100"})
    fake.add_node("h", 2, **{"ray.io/accelerator-type": "H100"})
    holder = fake.submit(1, gpu_types=("H100",), behaviour=Behaviour(50))
    blocked = fake.submit(2, gpu_types=("H100",))
    either = fake.submit(1)
    behind = fake.submit(1, gpu_types=("H100",))
    fake.run(lambda: status(fake, holder) is Status.RUNNING)
    assert status(fake, either) in (Status.RESERVING, Status.RUNNING), "the A100 is nobody else's"
    assert why(fake.state, fake.state.jobs[blocked], fake.now).code == reasons.WAITING_FOR_CAPACITY
    reason = why(fake.state, fake.state.jobs[behind], fake.now)
    assert (reason.code, reason.evidence["for"]) == (reasons.RESERVED, blocked)
    fake.run()
    assert len(fake.ended) == 4


def test_cpus_that_are_short_are_not_called_fragmentation() -> None:
    fake = cluster(4)
    fake.submit(1, cpu_milli=60_000, behaviour=Behaviour(50))
    job = fake.submit(1, cpu_milli=8_000)
    reason = why(fake.state, fake.state.jobs[job], fake.now)
    assert reason.code == reasons.WAITING_FOR_CAPACITY
    assert reason.evidence["cpus_on_one_node"] == 4


def test_a_lease_ends_with_its_node() -> None:
    fake = cluster(2, 2)
    lease = fake.submit(2, kind=Kind.LEASE, behaviour=Behaviour(1000))
    fake.run(lambda: status(fake, lease) is Status.RUNNING)
    attempt = fake.state.jobs[lease].attempt
    assert attempt is not None
    fake.lose_node(attempt.placed[0].node_id)
    fake.run(lambda: lease in fake.ended)
    assert fake.ended[lease].status is Status.FAILED
    assert "died" in fake.ended[lease].outcome.message


def test_enough_gpus_in_the_wrong_shape_is_fragmented() -> None:
    fake = cluster(4, 4)
    fake.submit(3)
    fake.submit(2)
    blocked = fake.submit(3)
    fake.run(lambda: status(fake, "j2") is Status.RUNNING)
    reason = why(fake.state, fake.state.jobs[blocked], fake.now)
    assert reason.code == reasons.FRAGMENTED
    assert reason.evidence["free_on_one_node"] == 2


def test_best_fit_keeps_whole_nodes_whole() -> None:
    fake = cluster(8, 8)
    fake.submit(3)
    fake.submit(5)
    fake.submit(8)
    fake.run(lambda: all(job.status is Status.RUNNING for job in fake.state.jobs.values()))
    assert len(fake.state.jobs) == 3


def test_a_gang_is_whole_or_absent() -> None:
    fake = cluster(4, 4, 4)
    gang = fake.submit(4, count=3)
    fake.run(lambda: status(fake, gang) is Status.RUNNING)
    attempt = fake.state.jobs[gang].attempt
    assert attempt is not None
    assert sorted(p.node_id for p in attempt.placed) == ["n0", "n1", "n2"]


@pytest.mark.parametrize(
    ("strategy", "count", "gpus", "nodes"),
    [
        (Strategy.PACK, 2, (4, 4), 1),
        (Strategy.SPREAD, 2, (4, 4), 2),
        (Strategy.STRICT_SPREAD, 2, (4, 4), 2),
        (Strategy.STRICT_PACK, 2, (4, 4), 1),
        (Strategy.PACK, 3, (4, 2), 2),
        (Strategy.SPREAD, 3, (4, 2), 2),
    ],
)
def test_strategies(strategy: Strategy, count: int, gpus: tuple[int, ...], nodes: int) -> None:
    fake = cluster(*gpus)
    job = fake.submit(2, count=count, strategy=strategy)
    fake.run(lambda: status(fake, job) is Status.RUNNING)
    attempt = fake.state.jobs[job].attempt
    assert attempt is not None
    assert len({p.node_id for p in attempt.placed}) == nodes


@pytest.mark.parametrize(("strategy", "count"), [(Strategy.STRICT_SPREAD, 3), (Strategy.STRICT_PACK, 3)])
def test_strict_strategies_that_cannot_be_met_do_not_start(strategy: Strategy, count: int) -> None:
    fake = cluster(4, 4)
    job = fake.submit(2, count=count, strategy=strategy)
    fake.run()
    assert why(fake.state, fake.state.jobs[job], fake.now).code == reasons.INFEASIBLE


def test_two_halves_on_two_devices_are_not_a_whole() -> None:
    fake = cluster(2)
    for _ in range(3):
        fake.submit(0.5, behaviour=Behaviour(100))
    fake.run(lambda: fake.now > 50)
    assert fake.state.nodes["n0"].devices.free == (0, 5_000)
    whole = fake.submit(1)
    assert status(fake, whole) is Status.QUEUED
    half = fake.submit(0.5, priority=1)
    assert status(fake, half) is Status.RESERVING


def test_foreign_use_is_respected() -> None:
    fake = cluster(4)
    fake.happen(ForeignUseObserved(0, "n0", 3 * GPU_UNIT, 0, 0))
    job = fake.submit(2)
    assert status(fake, job) is Status.QUEUED
    fake.happen(ForeignUseObserved(1, "n0", 0, 0, 0))
    assert status(fake, job) is Status.RESERVING


def test_user_failures_use_retries_and_infrastructure_uses_its_own() -> None:
    fake = cluster(1)
    failing = fake.submit(
        1, behaviour=Behaviour(1, ("fail", "lost", "fail")), max_retries=1, max_infra_retries=1
    )
    fake.run()
    ended = fake.ended[failing]
    assert ended.status is Status.FAILED
    assert (ended.attempts, ended.failures, ended.infra_failures) == (3, 1, 1)
    assert ended.outcome is not None
    assert ended.outcome.exit_code == 1


def test_a_failed_reservation_costs_no_retry() -> None:
    fake = cluster(1)
    job = fake.submit(1, behaviour=Behaviour(1, ("unready",) * 6 + ("ok",)), max_infra_retries=0)
    fake.run()
    assert fake.ended[job].status is Status.SUCCEEDED
    assert fake.ended[job].attempts == 7


def test_a_lost_node_requeues_its_gang_elsewhere() -> None:
    fake = cluster(2, 2, 2)
    gang = fake.submit(2, count=2, behaviour=Behaviour(10))
    fake.run(lambda: status(fake, gang) is Status.RUNNING)
    attempt = fake.state.jobs[gang].attempt
    assert attempt is not None
    fake.lose_node(attempt.placed[0].node_id)
    fake.run()
    assert fake.ended[gang].status is Status.SUCCEEDED
    assert fake.ended[gang].infra_failures == 1


def test_time_limit_ends_a_job() -> None:
    fake = cluster(1)
    job = fake.submit(1, behaviour=Behaviour(1000), time_limit_s=5.0)
    fake.run(lambda: job in fake.ended)
    assert fake.ended[job].status is Status.TIMED_OUT
    assert fake.now < 20


@pytest.mark.parametrize("moment", [Status.QUEUED, Status.RESERVING, Status.RUNNING, Status.STOPPING])
def test_cancel_at_every_moment(moment: Status) -> None:
    fake = cluster(1)
    if moment is Status.QUEUED:
        fake.submit(1)
    job = fake.submit(1)
    fake.run(lambda: status(fake, job) is moment)
    fake.cancel(job)
    fake.cancel(job)
    fake.run()
    # A job that had succeeded before the wish came has succeeded.
    assert fake.ended[job].status is (Status.SUCCEEDED if moment is Status.STOPPING else Status.CANCELLED)
    assert fake.state.totals().charged == 0
    assert not fake.held


def test_a_second_cycle_at_the_same_moment_plans_nothing() -> None:
    fake = cluster(2)
    fake.submit(2)
    fake.submit(2)
    fake.submit(8)
    assert schedule(fake.state, fake.now).events == ()


def test_news_of_an_old_attempt_is_dropped_and_impossible_news_is_refused() -> None:
    fake = cluster(1)
    job = fake.submit(1, behaviour=Behaviour(10, ("lost", "ok")))
    fake.run(lambda: job in fake.state.jobs and fake.state.jobs[job].attempts == 2)
    before = fake.state.version
    assert fake.state.apply(RunExited(fake.now, job, 1, Outcome(Status.SUCCEEDED))) == []
    assert fake.state.version == before
    with pytest.raises(InvalidTransition) as caught:
        fake.state.apply(RunStarted(fake.now, job, 2))
    assert caught.value.context["job"] == job
    assert caught.value.context["story"]


def test_a_restart_from_the_records_gives_the_same_state_and_resumes() -> None:
    fake = cluster(2, 2)
    fake.submit(2, behaviour=Behaviour(100))
    fake.submit(1, behaviour=Behaviour(100))
    fake.submit(4)
    fake.run(lambda: status(fake, "j2") is Status.RUNNING)
    again = ClusterState()
    effects = again.restore(list(fake.state.jobs.values()))
    for node in fake.state.nodes.values():
        again.apply(
            NodeJoined(0, node.id, node.name, node.gpu_slots, node.cpu_milli, node.memory_bytes, node.labels)
        )
    again.check()
    assert again.nodes == fake.state.nodes
    assert sorted(again.pending.ids()) == sorted(fake.state.pending.ids())
    assert again.jobs == fake.state.jobs
    assert {(type(e).__name__, e.job_id) for e in effects} == {("Run", "j1"), ("Run", "j2")}


def test_being_told_twice_changes_nothing() -> None:
    fake = cluster(1)
    job = fake.submit(1)
    fake.run(lambda: status(fake, job) is Status.RUNNING)
    version = fake.state.version
    assert fake.state.apply(PlacementReady(fake.now, job, 1)) == []
    assert fake.state.apply(RunStarted(fake.now, job, 1)) == []
    assert fake.state.version == version
    with pytest.raises(InvalidTransition):
        fake.state.apply(JobSubmitted(fake.now, fake.state.jobs[job]))


def test_two_cycles_agree_on_what_is_kept_without_a_date() -> None:
    """j6 shares a device with j1: whether it was admitted by this cycle or before must not change what j4 is kept."""
    queues = {name: QueuePolicy(name) for name in "ab"}
    fake = FakeCluster(policy=Policy(queues=queues, default_queue="a"))
    fake.add_node("m", 4)
    fake.add_node("n", 8)
    for queue, gpus in (("a", 0.5), ("a", 2), ("b", 8), ("b", 2), ("b", 0.5), ("a", 0.5)):
        fake.submit(gpus, queue=queue, behaviour=Behaviour(1e6))
    fake.check()


def test_a_search_that_failed_by_a_later_clock_is_made_again() -> None:
    fake = FakeCluster(policy=Policy({"a": QueuePolicy("a", preempt=Preempt.LOWER)}, default_queue="a"))
    fake.now = 1_000_000.0
    fake.add_node("n", 2)
    forever = Behaviour(1e9)
    firm = fake.submit(1, queue="a", preemptible=False, behaviour=forever)
    soft = fake.submit(1, queue="a", behaviour=forever)
    fake.run(lambda: status(fake, firm) is status(fake, soft) is Status.RUNNING)
    fake.now += 100.0
    fake.submit(2, priority=100, queue="a")
    assert status(fake, soft) is Status.RUNNING, "to stop it would not be enough"
    fake.now -= 50.0
    fake.happen(RunExited(fake.now, firm, 1, Outcome(Status.SUCCEEDED)))
    assert status(fake, soft) is Status.STOPPING
