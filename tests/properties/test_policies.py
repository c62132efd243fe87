"""Random policies, queues, owners and jobs: the rules hold at every moment, whatever is configured.

`FakeCluster` checks after every event that the books balance, that a second cycle plans nothing, and that no
backfill moves a date that was promised. Here the evictions and the quotas are watched from outside as well.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rm.core import preemption
from rm.core.cycle import why_each
from rm.core.events import CheckpointReported, HoldChanged, JobAdmitted, StopRequested
from rm.core.forecast import Twin
from rm.core.model import Status, StopCause, Strategy
from rm.core.policy import ANY, Backfill, Order, Policy, Preempt, QueuePolicy, Reclaim
from rm.core.resources import GPU_UNIT
from rm.core.state import ClusterState
from rm.testing import Behaviour, FakeCluster

STEPS = int(os.environ.get("RM_PROPERTY_STEPS", "40"))
EXAMPLES = int(os.environ.get("RM_PROPERTY_EXAMPLES", "100"))
LEAVES = ("a", "b", "team/x", "team/y")
TYPES = ("A100", "H100")


def amounts(draw: st.DrawFn, most: int) -> dict[str, int]:
    chosen = {}
    for kind in (ANY, "A100"):
        if draw(st.booleans()):
            chosen[kind] = draw(st.integers(0, most)) * GPU_UNIT
    return chosen


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    queues = {}
    owns = draw(st.booleans())
    for name in ("a", "b", "team", "team/x", "team/y"):
        parent = "team" if name.startswith("team/") else None
        queues[name] = QueuePolicy(
            name,
            parent,
            nominal=amounts(draw, 8) if owns and draw(st.booleans()) else None,
            borrow_limit=amounts(draw, 4) if draw(st.booleans()) else None,
            lend_limit=amounts(draw, 4) if draw(st.booleans()) else None,
            weight=draw(st.sampled_from([0.5, 1.0, 3.0])),
            preempt=draw(st.sampled_from(list(Preempt))),
            reclaim=draw(st.sampled_from(list(Reclaim))),
            stopped=draw(st.integers(0, 9)) == 0,
            max_gpus_per_owner=draw(st.sampled_from([None, None, 4 * GPU_UNIT])),
        )
    return Policy(
        queues=queues,
        default_queue="a",
        order=draw(st.sampled_from(list(Order))),
        backfill=draw(st.sampled_from([Backfill.EASY, Backfill.EASY, Backfill.SKIP, Backfill.NONE])),
        half_life_s=draw(st.sampled_from([60.0, 7 * 86400.0])),
        max_age_s=draw(st.sampled_from([20.0, 2_000.0, 86400.0])),
        min_runtime_s=draw(st.sampled_from([0.0, 7.0])),
        settle_s=draw(st.sampled_from([0.0, 5.0, 60.0])),
        patience_s=draw(st.sampled_from([0.0, 0.0, 30.0])),
    )


class AnyPolicy(RuleBasedStateMachine):
    """One cluster under one policy after another."""

    @initialize(policy=policies())
    def start(self, policy: Policy) -> None:
        self.fake = FakeCluster(policy=policy)
        self.joined = 0
        self.seen = 0
        self.join(8, None)
        self.join(4, "A100")

    @rule(gpus=st.sampled_from([2, 4, 8]), kind=st.sampled_from([None, *TYPES]))
    def join(self, gpus: int, kind: str | None) -> None:
        if len(self.fake.state.nodes) < 6:
            self.joined += 1
            labels = {"ray.io/accelerator-type": kind} if kind else {}
            self.fake.add_node(f"n{self.joined}", gpus, **labels)

    @rule(
        gpus=st.sampled_from([0.25, 0.5, 1, 1, 2, 4, 8]),
        cpus=st.sampled_from([0, 0, 0, 4, 20]),
        memory_gib=st.sampled_from([0, 0, 0, 80]),
        count=st.integers(1, 3),
        least=st.integers(0, 2),
        queue=st.sampled_from(LEAVES),
        owner=st.sampled_from(["ann", "bob", "cyd"]),
        priority=st.sampled_from([-100, 0, 0, 100]),
        limit=st.sampled_from([None, 3.0, 20.0, 200.0]),
        duration=st.sampled_from([1.0, 10.0, 100.0, 10_000.0]),
        fates=st.lists(st.sampled_from(["ok", "ok", "fail", "lost", "unready"]), max_size=2),
        types=st.sampled_from([(), (), ("A100",), ("H100", "A100")]),
        strategy=st.sampled_from(list(Strategy)),
        preemptible=st.integers(0, 4),
        after=st.booleans(),
    )
    def submit(self, gpus, cpus, memory_gib, count, least, queue, owner, priority, limit, duration, fates, types,
               strategy, preemptible, after) -> None:  # fmt: skip
        live = sorted(self.fake.state.jobs)
        self.fake.submit(
            gpus,
            cpu_milli=cpus * 1000,
            memory_bytes=memory_gib * 2**30,
            count=1 if gpus < 1 else count,
            least=least if gpus >= 1 and least < count else 0,
            queue=queue,
            owner=owner,
            priority=priority,
            time_limit_s=limit,
            behaviour=Behaviour(duration, (*fates, "ok")),
            gpu_types=types,
            strategy=strategy,
            preemptible=preemptible > 0,
            after=(live[len(live) // 2],) if after and live else (),
            max_infra_retries=1,
            grace_s=1.0,
        )

    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.fake.step()

    @rule(which=st.integers(1, 3))
    def save_after_a_while(self, which: int) -> None:
        """Ten minutes later some report a checkpoint: from then on `shortest_first` may stop them."""
        until = self.fake.now + 600.0
        for _ in range(100):
            due = self.fake.next_due()
            if due is None or due > until:
                break
            self.fake.step()
        self.fake.now = max(self.fake.now, until)
        for number, job in enumerate(sorted(self.fake.state.jobs.values(), key=lambda job: job.seq)):
            if job.status is Status.RUNNING and job.attempt is not None and number % which == 0:
                self.fake.happen(CheckpointReported(self.fake.now, job.id, job.attempt.number))

    @precondition(lambda self: self.fake.state.jobs)
    @rule(which=st.integers(0, 30))
    def cancel(self, which: int) -> None:
        ids = sorted(self.fake.state.jobs)
        self.fake.cancel(ids[which % len(ids)])

    @precondition(lambda self: self.fake.state.jobs)
    @rule(which=st.integers(0, 30), held=st.booleans())
    def hold(self, which: int, held: bool) -> None:
        ids = sorted(self.fake.state.jobs)
        self.fake.dates.clear()
        self.fake.happen(HoldChanged(self.fake.now, ids[which % len(ids)], held, "admin"))

    @rule(which=st.integers(0, 5))
    def lose(self, which: int) -> None:
        ids = sorted(self.fake.state.nodes)
        if len(ids) > 1:
            self.fake.lose_node(ids[which % len(ids)])

    @rule(policy=policies())
    def reconfigure(self, policy: Policy) -> None:
        self.fake.apply_policy(policy)

    @invariant()
    def evictions_are_lawful(self) -> None:
        """Only who may be evicted was: it was preemptible, ran long enough, and somebody has the better right."""
        history = self.fake.history
        for event in history[self.seen :]:
            if isinstance(event, StopRequested) and event.cause is StopCause.PREEMPTED:
                victim = self.fake.state.jobs.get(event.job_id) or self.fake.ended[event.job_id]
                assert victim.preemptible
            if isinstance(event, JobAdmitted):
                job = self.fake.state.jobs.get(event.job_id)
                assert job is None or not (job.held or job.after)
        self.seen = len(history)

    @invariant()
    def reloading_gives_the_same(self) -> None:
        again = ClusterState(self.fake.state.policy)
        again.restore(self.fake.state.jobs.values())
        assert again.jobs == self.fake.state.jobs
        assert sorted(again.pending.ids()) == sorted(self.fake.state.pending.ids())

    def teardown(self) -> None:
        """Open everything, give it room, and everything that can run runs to its end."""
        if not hasattr(self, "fake"):
            return
        self.fake.apply_policy(Policy(queues={name: QueuePolicy(name) for name in LEAVES}, default_queue="a"))
        for job_id in sorted(self.fake.state.jobs):
            self.fake.dates.clear()
            self.fake.happen(HoldChanged(self.fake.now, job_id, False))
        for number, kind in enumerate((None, *TYPES) * 3):
            labels = {"ray.io/accelerator-type": kind} if kind else {}
            self.fake.add_node(f"end{number}", 24, **labels)
        self.fake.run()
        assert self.fake.state.totals().charged == 0
        assert not self.fake.held
        left = [job.id for job in self.fake.state.jobs.values() if job.status is not Status.QUEUED]
        assert not left
        assert not self.fake.state.jobs, [
            str(job.gang) + job.gang.strategy for job in self.fake.state.jobs.values()
        ]


class AnyClock(AnyPolicy):
    """The same, and the clock is set forwards and back. The core is given times that go backwards, and carries on."""

    @rule(step_s=st.sampled_from([-100_000.0, -700.0, -20.0, -2.0, -0.5, 30.0, 5_000.0, 100_000.0]))
    def set_the_clock(self, step_s: float) -> None:
        self.fake.now = max(0.0, self.fake.now + step_s)
        self.fake.dates.clear()  # what was promised was promised by another clock
        self.fake.happen()

    @rule()
    def ask_why(self) -> None:
        waiting = [job for job in self.fake.state.jobs.values() if job.status is Status.QUEUED]
        assert len(why_each(self.fake.state, waiting, self.fake.now)) == len(waiting)
        for job in waiting[:1]:
            forecast = Twin(self.fake.state, self.fake.now).forecast(job.id)
            assert all(each is None or each >= 0 for each in (forecast.p50_s, forecast.p90_s))

    @invariant()
    def use_is_never_negative(self) -> None:
        state = self.fake.state
        for usage in state.books.usage.values():
            assert usage.average >= 0
            assert usage.current >= 0
            for now in (self.fake.now, usage.at - 1e6, 0.0):
                assert usage.standing(now, state.policy.half_life_s) >= 0

    @invariant()
    def nobody_ran_or_loses_less_than_nothing(self) -> None:
        for job in self.fake.state.jobs.values():
            assert job.ran_s >= 0
            assert job.attempt is None or preemption.loss(job, self.fake.now) >= 0


for machine in (AnyPolicy, AnyClock):
    machine.TestCase.settings = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
TestAnyPolicy = AnyPolicy.TestCase
TestAnyClock = AnyClock.TestCase
