"""`shortest_first` on random clusters full of long jobs: whoever is stopped makes room for the one it was stopped for.

`FakeCluster` checks besides, after every event, that the books balance and that a second cycle plans nothing.
"""

from __future__ import annotations

import os

from hypothesis import example, given, settings
from hypothesis import strategies as st

from rm.core.events import CheckpointReported, JobSubmitted, NodeJoined, StopRequested
from rm.core.gittins import Remaining
from rm.core.model import Gang, Job, Kind, Status, Strategy
from rm.core.policy import Backfill, Order, Policy, QueuePolicy
from rm.core.resources import Bundle, gpu_units
from rm.testing import Behaviour, FakeCluster

EXAMPLES = int(os.environ.get("RM_PROPERTY_EXAMPLES", "100"))
WAITED_S = 700.0
WHOLE: list[float] = [1, 1, 2, 3, 4]
SHARES: list[float] = [0.5, 0.75]
"""Who wants a share stops nobody, and may stand before one who does and take a part of what comes back."""
QUEUES = ("a", "b", "c")
"""Without quotas, and nobody has waited for `max_age`: these are told of in tests/scenarios."""
RANKS = {"short": 60.0, "middling": 500.0, "long": 2_000.0, "endless": 1_000_000.0}


class Ranks(Remaining):
    def rank(self, job: Job, age_s: float) -> float:
        return RANKS[job.owner]


def requests(gpus: list[float], owners: list[str], priorities: list[int]) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {
            "gpus": st.sampled_from(gpus),
            "count": st.sampled_from([1, 1, 1, 2, 3]),
            "least": st.sampled_from([0, 0, 1]),
            "cpus": st.sampled_from([0, 0, 2, 6]),
            "strategy": st.sampled_from(list(Strategy)),
            "queue": st.sampled_from(QUEUES),
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


def wants(gpus: float, owner: str, *, cpus: int = 0, count: int = 1, priority: int = 0) -> dict:
    """A request as `requests` makes them."""
    return {
        "gpus": gpus, "count": count, "least": 0, "cpus": cpus, "strategy": Strategy.PACK, "queue": "a",
        "owner": owner, "priority": priority, "preemptible": True,
    }  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@example(  # one stops two, for CPUs and for a GPU; whoever comes before it fits on what the second leaves
    nodes=[(1, 4), (1, 4), (3, 8), (5, 8)],
    running=[
        wants(1, "middling"), wants(1, "middling", cpus=6), wants(0.5, "long", cpus=6),
        *[wants(1, "middling")] * 3, wants(4, "long"), wants(0.5, "middling"), *[wants(1, "middling")] * 3,
        wants(2, "middling", count=2, priority=100),
    ],
    saved=1 << 2 | 1 << 6,
    coming=[wants(1, "short", cpus=6)],
)  # fmt: skip
@given(
    nodes=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([4, 8, 64])), min_size=1, max_size=4),
    running=st.lists(
        requests(WHOLE + SHARES, ["middling", "long", "endless"], [0, 0, -100, 100]), min_size=1, max_size=12
    ),
    saved=st.integers(0, 2**12 - 1),
    coming=st.lists(requests(WHOLE, ["short", "short", "middling"], [0]), min_size=1, max_size=5),
)
def test_nobody_is_stopped_in_vain(nodes, running, saved, coming) -> None:
    queues = {name: QueuePolicy(name) for name in QUEUES}
    policy = Policy(queues, "a", order=Order.SHORTEST_FIRST, backfill=Backfill.SKIP)
    fake = FakeCluster(policy=policy)
    fake.state.remaining = Ranks()
    for number, (gpus, cpus) in enumerate(nodes):
        fake.happen(NodeJoined(0.0, f"n{number}", f"n{number}", gpus, cpus * 1000, 2**38, ()))
    for number, said in enumerate(running):
        fake.behaviours[f"j{number}"] = Behaviour(1e7)
        fake.happen(JobSubmitted(0.0, job(number, 0.0, said)))
    while (due := fake.next_due()) is not None and due <= WAITED_S:
        fake.step()
    fake.now = WAITED_S
    for number in range(len(running)):
        live = fake.state.jobs[f"j{number}"]
        if saved >> number & 1 and live.status is Status.RUNNING and live.attempt is not None:
            fake.happen(CheckpointReported(WAITED_S, live.id, live.attempt.number))
    began = len(fake.history)
    arrivals = [job(len(running) + index, WAITED_S, said) for index, said in enumerate(coming)]
    for each in arrivals:
        fake.behaviours[each.id] = Behaviour(1e7)
    fake.happen(*(JobSubmitted(WAITED_S, each) for each in arrivals))
    stops = [each for each in fake.history[began:] if isinstance(each, StopRequested)]
    while any(each.status is Status.STOPPING for each in fake.state.jobs.values()):
        fake.step()
    fake.step()
    for stop in stops:
        assert fake.state.jobs[stop.by].attempt is not None, (
            f"{stop.job_id} was stopped for {stop.by} in vain"
        )
