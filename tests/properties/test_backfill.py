"""EASY's promise, watched from outside: once the first blocked job has a date, nobody behind it moves that date.

One queue, first come, first served, every job with a limit that it keeps: so no job has a better right than the first,
and all ends are known. Jobs wait for GPUs, for CPUs or for memory.
"""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from rm.core.cycle import Notes
from rm.core.events import JobAdmitted
from rm.core.policy import Order, Policy
from rm.testing import Behaviour, FakeCluster

JOBS = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1, 1, 1, 2, 4]),
        st.integers(1, 2),
        st.sampled_from([0, 4, 16, 60]),
        st.sampled_from([0, 0, 20, 200]),
        st.sampled_from([None, 8.0, 20.0, 60.0]),
        st.integers(0, 15),
    ),
    min_size=4,
    max_size=25,
)
DURATION_S = {None: 90.0, 8.0: 7.0, 20.0: 6.0, 60.0: 59.0}


def dates(fake: FakeCluster) -> dict[str, float]:
    """The dates ahead. Who waits for what is on its way back already (a date that is now) may be second."""
    notes = fake.state.plans.get("cycle")
    found = notes.reservations.values() if isinstance(notes, Notes) else ()
    return {each.job_id: each.at for each in found if each.at > fake.now}


@settings(max_examples=150, deadline=None)
@given(JOBS)
def test_nobody_behind_moves_the_date_of_the_first_blocked_job(jobs: list[tuple]) -> None:
    fake = FakeCluster(policy=Policy(order=Order.FIFO))
    fake.add_node("n0", 8)
    fake.add_node("n1", 8)
    promised: dict[str, float] = {}

    def look() -> None:
        for event in fake.history:
            if isinstance(event, JobAdmitted) and event.job_id in promised:
                assert event.at <= promised.pop(event.job_id) + 1.0
        fake.history.clear()
        for job_id, at in dates(fake).items():
            promised[job_id] = min(at, promised.get(job_id, at))

    for gpus, count, cpus, memory_gib, limit, pause_s in jobs:
        fake.submit(
            gpus,
            count=1 if gpus < 1 else count,
            cpu_milli=cpus * 1000,
            memory_bytes=memory_gib * 2**30,
            time_limit_s=limit,
            behaviour=Behaviour(DURATION_S[limit]),
            grace_s=0.0,
        )
        look()
        until = fake.now + pause_s
        while fake.now < until and fake.step():
            look()
    while fake.step():
        look()
    assert not fake.state.jobs


GANGS = [(1, 1), (1, 1), (2, 1), (2, 1), (4, 1), (8, 1), (3, 3), (4, 2)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_without_limits_a_gang_keeps_what_joins_and_ends_though_nobody_knows_when(seed: int) -> None:
    """A second cycle at the same moment, which `FakeCluster` plays, must not hope for ends that the first did without.

    Seen: a node joins and a gang keeps a part of it. Who got the rest was then somebody that might end, so less was
    kept, and the next one got that. It takes a full cluster: Hypothesis, left to itself, plays small ones.
    """
    random = Random(seed)
    fake = FakeCluster()
    for number in range(6):
        fake.add_node(f"n{number}", 8)
    for number in range(60):
        gpus, count = random.choice(GANGS)
        fake.submit(gpus, count=count, behaviour=Behaviour(random.uniform(50, 500)))
        for _ in range(random.randrange(3)):
            fake.step()
        if number in (25, 35, 45):
            fake.add_node(f"late{number}", 8)
    fake.run()
    assert len(fake.ended) == 60
