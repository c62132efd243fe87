"""Cordon, drain and health: what the scenarios can't say."""

from __future__ import annotations

import pytest

from rm.core.cycle import why
from rm.core.events import (
    CordonInherited,
    JobAdmitted,
    NodeCordoned,
    NodeJoined,
    NodeLost,
    RunExited,
    RunLost,
    StopRequested,
)
from rm.core.forecast import Twin
from rm.core.health import NAMED, Failure, Health
from rm.core.model import Cordon, Kind, Outcome, Status, StopCause
from rm.core.policy import Policy
from rm.core.resources import GPU_UNIT
from rm.core.state import ClusterState
from rm.testing import Behaviour, FakeCluster

LONG = Behaviour(1000.0)


def running(*gpus: int, jobs: int = 1) -> FakeCluster:
    fake = FakeCluster()
    for number, count in enumerate(gpus):
        fake.add_node(f"n{number}", count)
    for _ in range(jobs):
        fake.submit(1, behaviour=LONG)
    fake.run(lambda: all(job.status is Status.RUNNING for job in fake.state.jobs.values()))
    return fake


def node_of(fake: FakeCluster, job_id: str) -> str:
    attempt = fake.state.jobs[job_id].attempt
    assert attempt is not None
    return attempt.placed[0].node_id


def test_a_drained_job_loses_no_retry_no_pause_and_no_place_in_the_order() -> None:
    fake = running(1, 1)
    before = fake.state.jobs["j1"]
    first = node_of(fake, "j1")
    fake.cordon(first, draining=True, deadline=fake.now)
    assert fake.state.jobs["j1"].status is Status.STOPPING, "at once, in the same turn"
    fake.run(lambda: fake.state.jobs["j1"].status is Status.RUNNING)
    job = fake.state.jobs["j1"]
    assert node_of(fake, "j1") != first
    assert (job.attempts, job.evictions, job.failures, job.infra_failures) == (2, 1, 0, 0)
    assert (job.eligible_at, job.seq, job.submitted_at) == (0.0, before.seq, before.submitted_at)
    assert job.outcome is not None
    assert job.outcome.message == f"stopped to go on elsewhere: node {first} is drained"
    assert not job.outcome.infra


def test_a_cancellation_overrules_a_drain() -> None:
    fake = running(1, 1)
    fake.cordon("n0", draining=True, deadline=fake.now)
    fake.cancel("j1")
    fake.run()
    assert fake.ended["j1"].status is Status.CANCELLED


def test_the_totals_give_nothing_of_a_cordoned_node_away() -> None:
    fake = running(4)
    fake.cordon("n0")
    totals = fake.state.totals()
    assert (totals.capacity, totals.charged, totals.free) == (4 * GPU_UNIT, GPU_UNIT, 0)
    fake.uncordon("n0")
    assert fake.state.totals().free == 3 * GPU_UNIT


def test_since_when_is_the_first_time_and_the_rest_is_the_last_word() -> None:
    state = ClusterState()
    state.apply(NodeCordoned(1.0, "n", "ada", "a fan"))
    state.apply(NodeCordoned(2.0, "n", "bob", "the disk", True, 9.0))
    cordon = Cordon("n", 1.0, "bob", "the disk", True, 9.0)
    assert state.cordons == {"n": cordon}
    assert state.take_cordons() == {"n": cordon}
    version = state.version
    state.apply(NodeCordoned(3.0, "n", "bob", "the disk", True, 9.0))
    assert state.version == version, "that is old news"
    assert state.take_cordons() == {}


def test_a_deadline_that_passed_while_nobody_looked_is_met() -> None:
    fake = running(1, 1)
    where = node_of(fake, "j1")
    again = ClusterState()
    again.restore(fake.state.jobs.values(), cordons=[Cordon(where, 0.0, draining=True, deadline=5.0)])
    assert again.due(100.0) == [StopRequested(100.0, "j1", StopCause.DRAINED, f"node {where}")]


def test_the_forecast_knows_of_cordons_and_of_drains() -> None:
    fake = FakeCluster()
    fake.add_node("n0", 1)
    fake.add_node("n1", 1)
    for limit in (50.0, 100.0):
        fake.submit(1, behaviour=LONG, time_limit_s=limit)
    fake.run(lambda: all(job.status is Status.RUNNING for job in fake.state.jobs.values()))
    waiting = fake.submit(1)
    fake.cordon(node_of(fake, "j1"))
    p50_s = Twin(fake.state, fake.now).forecast(waiting).p50_s
    assert p50_s is not None
    assert 95 < p50_s < 105, "not on the node that is free first"


def test_a_wait_for_capacity_tells_of_cordoned_nodes() -> None:
    fake = running(1, 8, 8)
    for node_id in ("n1", "n2"):
        fake.cordon(node_id)
    job = fake.state.jobs[fake.submit(1)]
    assert why(fake.state, job, fake.now).message == (
        "needs 1 GPU, 0 are free; 2 nodes (16 GPUs) are cordoned"
    )


# --- health ------------------------------------------------------------------------------------------------


def lost(fake: FakeCluster, job_id: str, node_id: str | None) -> None:
    fake.happen(RunLost(fake.now, job_id, fake.state.jobs[job_id].attempts, "it died", node_id))


def cordons(fake: FakeCluster) -> list[str]:
    return [event.node_id for event in fake.history if isinstance(event, NodeCordoned)]


def test_a_failing_node_is_cordoned_in_the_name_of_health_with_the_attempts() -> None:
    fake = running(8, 8, jobs=3)
    for job_id in ("j1", "j2", "j3"):
        lost(fake, job_id, "n0")
    cordon = fake.state.cordons["n0"]
    assert (cordon.by, cordon.draining) == ("health", False)
    assert cordon.reason == (
        "3 infrastructure failures within 600 s: j1.1 (it died); j2.1 (it died); j3.1 (it died)"
    )


def test_processes_that_could_not_be_started_count_and_exit_codes_do_not() -> None:
    outcome = Outcome(Status.FAILED, "no more processes", node_id="n0", infra=True)
    exited = Outcome(Status.FAILED, "exited with code 1", node_id="n0", exit_code=1)
    for ended, expected in ((outcome, ["n0"]), (exited, [])):
        fake = running(8, 8, jobs=3)
        for job_id in ("j1", "j2", "j3"):
            fake.happen(RunExited(fake.now, job_id, 1, ended))
        assert cordons(fake) == expected


@pytest.mark.parametrize("node_id", [None, "gone"])
def test_failures_of_no_known_node_count_for_none(node_id: str | None) -> None:
    fake = running(8, 8, jobs=3)
    for job_id in ("j1", "j2", "j3"):
        lost(fake, job_id, node_id)
    assert cordons(fake) == []


def test_a_node_that_died_leaves_no_record() -> None:
    fake = running(8, 8, jobs=3)
    for job_id in ("j1", "j2"):
        lost(fake, job_id, "n0")
    fake.happen(NodeLost(fake.now, "n0"))
    fake.add_node("n0", 8)
    lost(fake, "j3", "n0")
    assert cordons(fake) == []


def test_the_reason_names_the_latest_failures() -> None:
    health, policy = Health(), Policy()
    for number in range(NAMED + 3):
        health.note("n", Failure(float(number), f"j{number}", 1, "why"))
    ((node_id, reason),) = health.failing(policy, 10.0)
    assert node_id == "n"
    assert reason.startswith("8 infrastructure failures within 600 s: … j3.1 (why); ")
    assert list(health.failing(policy, 610.0)) == [], "at 600 seconds and more all are old"


def test_a_job_on_a_draining_node_is_told_once() -> None:
    fake = running(1, 1)
    fake.cordon(node_of(fake, "j1"), draining=True, deadline=fake.now + 5)
    fake.run()
    stops = [event for event in fake.history if isinstance(event, StopRequested)]
    assert [event.cause for event in stops] == [StopCause.DRAINED]
    assert fake.ended["j1"].status is Status.SUCCEEDED


def joined(node_id: str, name: str) -> NodeJoined:
    return NodeJoined(5.0, node_id, name, 4, 0, 0)


def cordoned_and_gone(*others: NodeJoined) -> ClusterState:
    state = ClusterState()
    for event in (joined("old", "gpu-1"), *others, NodeCordoned(6.0, "old", "ada", "a fan", True, 99.0)):
        state.apply(event)
    state.apply(NodeLost(7.0, "old"))
    return state


def test_a_cordon_goes_on_with_the_node_that_has_its_name_now() -> None:
    state = cordoned_and_gone()
    assert state.cordons["old"] == Cordon("old", 6.0, "ada", "a fan", True, 99.0, "gpu-1", gone_at=7.0)
    assert state.due(8.0) == [], "nobody has its name"
    state.apply(joined("new", "gpu-1"))
    assert not state.nodes["new"].cordoned
    (event,) = state.due(8.0)
    assert event == CordonInherited(8.0, "new", "old")
    state.apply(event)
    assert state.cordons == {"new": Cordon("new", 6.0, "ada", "a fan", True, 99.0, "gpu-1")}
    assert state.nodes["new"].cordoned
    assert state.take_cordons() == {"new": state.cordons["new"], "old": None}
    assert state.due(9.0) == []
    state.check()


def test_a_name_that_several_nodes_have_tells_nothing() -> None:
    state = cordoned_and_gone(joined("twin", "gpu-1"))
    state.apply(joined("new", "gpu-1"))
    assert state.due(8.0) == []
    state.apply(NodeLost(9.0, "new"))
    assert [each.node_id for each in state.due(9.0)] == ["twin"], "now one has it"


def test_a_cordon_of_a_node_that_is_only_not_seen_yet_goes_to_nobody() -> None:
    """After a restart nodes come one by one, and two on one machine may have one name."""
    state = ClusterState()
    state.restore([], cordons=[Cordon("old", 6.0, "ada", name="gpu-1")])
    state.apply(joined("twin", "gpu-1"))
    assert state.due(8.0) == []
    state.apply(joined("old", "gpu-1"))
    assert state.nodes["old"].cordoned


def test_a_node_that_comes_back_under_its_id_keeps_its_cordon() -> None:
    state = cordoned_and_gone()
    state.apply(joined("old", "gpu-2"))
    assert state.cordons["old"] == Cordon("old", 6.0, "ada", "a fan", True, 99.0, "gpu-2")
    assert state.nodes["old"].cordoned


def test_what_is_said_of_a_cordoned_node_that_is_gone_keeps_its_name() -> None:
    state = cordoned_and_gone()
    state.apply(NodeCordoned(8.0, "old", "bob", "sold"))
    assert state.cordons["old"] == Cordon("old", 6.0, "bob", "sold", name="gpu-1", gone_at=7.0)


def test_a_lease_on_a_node_that_went_while_nobody_looked_is_lost() -> None:
    fake = FakeCluster()
    fake.add_node("n0", 1)
    fake.submit(1, kind=Kind.LEASE, behaviour=LONG)
    fake.run(lambda: all(job.status is Status.RUNNING for job in fake.state.jobs.values()))
    again = ClusterState()
    again.restore(fake.state.jobs.values())
    again.apply(NodeLost(fake.now, "n0"))
    assert again.jobs["j1"].status is Status.STOPPING


@pytest.mark.parametrize("known_at", [0.0, 0.005, 0.011, 0.4])
@pytest.mark.parametrize("group", ["unready", "ok"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_node_that_ray_takes_away_between_the_plan_and_the_group(
    known_at: float, group: str, nodes: int
) -> None:
    """At 0 the job is planned there, at 0.01 Ray makes the group or does not, at 0.5 the job would run."""
    fake = FakeCluster()
    fake.add_node("leaves", 1)
    if nodes == 2:
        fake.add_node("stays", 8)
    job = fake.submit(1, behaviour=Behaviour(attempts=(group, "ok")))
    assert fake.state.jobs[job].attempt.placed[0].node_id == "leaves"
    while (due := fake.next_due()) is not None and due <= known_at:
        fake.step()
    fake.now = known_at
    # As the runtime says it: what is there is to go at once.
    fake.cordon("leaves", "Ray takes the node away", draining=True, deadline=known_at)
    fake.run()
    node = fake.state.nodes["leaves"]
    assert node.devices.total_free == node.gpu_slots * GPU_UNIT, "nothing is charged there"
    assert not fake.held, "no group is left"
    record = fake.state.jobs[job] if nodes == 1 else fake.ended[job]
    assert (record.failures, record.infra_failures) == (0, 0), "it costs no retry"
    placed = [each for each in fake.history if isinstance(each, JobAdmitted)]
    assert [each.placed[0].node_id for each in placed] == ["leaves", "stays"][:nodes]
    if nodes == 1:
        assert record.status is Status.QUEUED
        assert why(fake.state, record, fake.now).code == "NodesCordoned"
    else:
        assert (record.status, record.attempts) == (Status.SUCCEEDED, 2)
