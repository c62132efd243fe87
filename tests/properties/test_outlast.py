"""`shortest_first` on random clusters full of long jobs: whoever is stopped makes room for the one it was stopped for.

`FakeCluster` checks besides, after every event, that the books balance and that a second cycle plans nothing.
"""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from rm.core.events import CheckpointReported, JobSubmitted, NodeJoined, StopRequested
from rm.core.gittins import Remaining
from rm.core.model import Gang, Job, Kind, Status, Strategy
from rm.core.policy import ANY, Backfill, Order, Policy, QueuePolicy
from rm.core.resources import GPU_UNIT, Bundle, gpu_units
from rm.testing import Behaviour, FakeCluster

EXAMPLES = int(os.environ.get("RM_PROPERTY_EXAMPLES", "100"))
AGES_S = 1_000.0
RANKS = {"short": 60.0, "middling": 500.0, "long": 2_000.0, "endless": 1_000_000.0}


class Ranks(Remaining):
    def rank(self, job: Job, age_s: float) -> float:
        return RANKS[job.owner]


@st.composite
def quotas(draw: st.DrawFn) -> dict[str, QueuePolicy]:
    owns = draw(st.booleans())
    return {
        name: QueuePolicy(
            name,
            nominal={ANY: draw(st.integers(0, 6)) * GPU_UNIT} if owns and draw(st.booleans()) else None,
            borrow_limit={ANY: draw(st.integers(0, 4)) * GPU_UNIT} if draw(st.booleans()) else None,
        )
        for name in ("a", "b", "c")
    }


def requests(owners: list[str], priorities: list[int]) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {
            "gpus": st.sampled_from([0.5, 0.75, 1, 1, 2, 3, 4]),
            "count": st.sampled_from([1, 1, 1, 2, 3]),
            "least": st.sampled_from([0, 0, 1]),
            "cpus": st.sampled_from([0, 0, 2, 6]),
            "strategy": st.sampled_from(list(Strategy)),
            "queue": st.sampled_from(["a", "b", "c"]),
            "owner": st.sampled_from(owners),
            "priority": st.sampled_from(priorities),
            "preemptible": st.sampled_from([True, True, True, False]),
        }
    )


def job(number: int, now: float, said: dict) -> Job:
    count = 1 if said["gpus"] < 1 else said["count"]
    least = said["least"] if count > 1 else 0
    bundle = Bundle(gpu_units(said["gpus"]), said["cpus"] * 1000)
    return Job(
        f"j{number}", number, f"j{number}", said["owner"], Kind.COMMAND,
        Gang(bundle, count, said["strategy"], least=least), now, queue=said["queue"],
        priority=said["priority"], preemptible=said["preemptible"], grace_s=1.0,
    )  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    queues=quotas(),
    backfill=st.sampled_from([Backfill.SKIP, Backfill.SKIP, Backfill.EASY]),
    nodes=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([4, 8, 64])), min_size=1, max_size=4),
    running=st.lists(requests(["middling", "long", "endless"], [0, 0, -100, 100]), min_size=1, max_size=12),
    waited=st.sampled_from([700.0, 700.0, AGES_S]),
    saved=st.integers(0, 2**12 - 1),
    coming=st.lists(requests(["short", "short", "middling"], [0]), min_size=1, max_size=5),
)
def test_nobody_is_stopped_in_vain(queues, backfill, nodes, running, waited, saved, coming) -> None:
    policy = Policy(queues, "a", order=Order.SHORTEST_FIRST, backfill=backfill, max_age_s=AGES_S)
    fake = FakeCluster(policy=policy)
    fake.state.remaining = Ranks()
    for number, (gpus, cpus) in enumerate(nodes):
        fake.happen(NodeJoined(0.0, f"n{number}", f"n{number}", gpus, cpus * 1000, 2**38, ()))
    for number, said in enumerate(running):
        fake.behaviours[f"j{number}"] = Behaviour(1e7)
        fake.happen(JobSubmitted(0.0, job(number, 0.0, said)))
    while (due := fake.next_due()) is not None and due <= waited:
        fake.step()
    fake.now = waited
    for number in range(len(running)):
        live = fake.state.jobs[f"j{number}"]
        if saved >> number & 1 and live.status is Status.RUNNING and live.attempt is not None:
            fake.happen(CheckpointReported(waited, live.id, live.attempt.number))
    began = len(fake.history)
    arrivals = [job(len(running) + index, waited, said) for index, said in enumerate(coming)]
    for each in arrivals:
        fake.behaviours[each.id] = Behaviour(1e7)
    fake.happen(*(JobSubmitted(waited, each) for each in arrivals))
    stops = [each for each in fake.history[began:] if isinstance(each, StopRequested)]
    while any(each.status is Status.STOPPING for each in fake.state.jobs.values()):
        fake.step()
    fake.step()
    for stop in stops:
        assert fake.state.jobs[stop.by].attempt is not None, (
            f"{stop.job_id} was stopped for {stop.by} in vain"
        )
