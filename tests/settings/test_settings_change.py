"""What another policy would do to the jobs that live: told before it is applied."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rm.core.model import Status
from rm.core.policy import Policy
from rm.settings import Settings
from rm.settings_change import Consequence, consequences
from rm.testing import Behaviour, FakeCluster
from rm.views import queue_views

A100 = {"ray.io/accelerator-type": "A100"}
LONG = Behaviour(10_000)
OPEN = "queues: {a: , b: }\ndefault_queue: a"


def policy(text: str) -> Policy:
    return Settings.parse(text).policy()


def cluster(text: str = OPEN) -> FakeCluster:
    """8 GPUs without a type, 4 A100."""
    fake = FakeCluster(policy=policy(text))
    fake.add_node("n", 8)
    fake.add_node("m", 4, **A100)
    return fake


def told(fake: FakeCluster, text: str) -> list[Consequence]:
    found = consequences(fake.state.jobs.values(), fake.state.node_shapes(), fake.policy, policy(text))
    # It is told before; then it must be possible.
    fake.apply_policy(policy(text))
    return found


def settle(fake: FakeCluster) -> None:
    fake.run(lambda: all(job.status is not Status.RESERVING for job in fake.state.jobs.values()))


def test_a_queue_that_vanishes_strands_what_waits_in_it() -> None:
    fake = cluster()
    fake.submit(8, queue="b", behaviour=LONG)
    fake.submit(8, queue="b")
    settle(fake)
    waits, goes_on = told(fake, "queues: {a: }")
    assert str(waits) == "queue b will be gone: 1 job (j2) waits until it is back"
    assert (waits.queue, waits.jobs) == ("b", ("j2",))
    assert str(goes_on) == "queue b will be gone: 1 job (j1) goes on, charged to no quota"


def test_a_queue_that_becomes_a_team_takes_no_jobs() -> None:
    fake = cluster()
    fake.submit(8, queue="b", behaviour=LONG)
    settle(fake)
    (found,) = told(fake, "queues: {a: , b: {queues: {c: }}}\ndefault_queue: a")
    assert str(found) == "queue b will have queues below it and take no jobs itself: 1 job (j1) goes on"


def test_a_queue_that_stops_says_who_waits() -> None:
    fake = cluster()
    fake.submit(8, queue="b", behaviour=LONG)
    for _ in range(7):
        fake.submit(8, queue="b")
    settle(fake)
    (found,) = told(fake, "queues: {a: , b: {stopped: true}}\ndefault_queue: a")
    assert str(found) == "queue b will be stopped: 7 jobs (j2, j3, j4, j5, j6 …) wait until it is open"
    assert len(found.jobs) == 7
    assert told(fake, "queues: {a: , b: {stopped: true}}\ndefault_queue: a") == []


def test_jobs_that_a_queue_could_never_hold_again() -> None:
    for rules in (
        "nominal: 2, borrow_limit: 0",
        "labels: {zone: b}",
        "max_gpus_per_owner: 4",
    ):
        fake = cluster()
        fake.submit(8, queue="a", behaviour=LONG)
        fake.submit(8, queue="b")
        settle(fake)
        found = told(fake, f"queues: {{a: , b: {{{rules}}}}}\ndefault_queue: a")[0]
        assert str(found) == "queue b could never hold 1 job (j2) that waits in it", rules


def test_a_type_that_gets_a_quota_is_looked_at_by_itself() -> None:
    fake = cluster()
    fake.submit(4, queue="a", gpu_types=("A100",), behaviour=LONG)
    fake.submit(4, queue="b", gpu_types=("A100",))
    settle(fake)
    found = told(fake, "queues: {a: , b: {nominal: {A100: 2}, borrow_limit: {A100: 1}}}\ndefault_queue: a")
    assert [str(each) for each in found] == [
        "queue b could never hold 1 job (j2) that waits in it",
        "queue a will own 0 A100 GPUs and holds 4 A100 GPUs: it borrows 4, which may be taken back from j1",
    ]


def test_running_jobs_above_a_smaller_quota() -> None:
    fake = cluster("queues: {a: {nominal: 8}, b: {nominal: 4}}\ndefault_queue: a")
    fake.submit(2, queue="a", behaviour=LONG, preemptible=False)
    fake.submit(3, queue="a", behaviour=LONG)
    settle(fake)
    change = (
        "queues: {{a: {{nominal: 4, borrow_limit: {limit}}}, b: {{nominal: 4, reclaim: {reclaim}}}}}\n"
        "default_queue: a"
    )
    (found,) = consequences(
        fake.state.jobs.values(),
        fake.state.node_shapes(),
        fake.policy,
        policy(change.format(limit=1, reclaim="any")),
    )
    assert (
        str(found)
        == "queue a will own 4 GPUs and holds 5 GPUs: it borrows 1, which may be taken back from j2"
    )
    first, second = told(
        fake,
        change.format(limit=0, reclaim="never").replace("nominal: 4, b", "nominal: 4, reclaim: never, b"),
    )
    assert str(first) == "queue a will own 4 GPUs and holds 5 GPUs: it borrows 1"
    assert (
        str(second) == "queue a will be 1 GPU above all that it may take: "
        "nothing more of it starts on these until they are given back"
    )
    assert second.jobs == ("j1", "j2")


def test_an_owner_above_the_new_limit() -> None:
    fake = cluster()
    fake.submit(3, queue="a", owner="ada", behaviour=LONG)
    fake.submit(2, queue="a", owner="ada", behaviour=LONG)
    fake.submit(2, queue="a", owner="bob", behaviour=LONG)
    settle(fake)
    (found,) = told(fake, "queues: {a: {max_gpus_per_owner: 4}, b: }\ndefault_queue: a")
    assert str(found).startswith("ada holds 5 GPUs in queue a, where one owner may hold 4: they go on")
    assert found.jobs == ("j1", "j2")


def test_more_than_there_is() -> None:
    fake = cluster()
    (found,) = told(fake, "queues: {a: {nominal: 8}, b: {nominal: 8}}\ndefault_queue: a")
    assert str(found) == (
        "the queues will own 16 GPUs together, and the cluster has or could launch 12: "
        "not all of them can have theirs at once"
    )


POLICIES = st.sampled_from([
    OPEN,
    "queues: {a: {nominal: 4}, b: {nominal: {A100: 2}, borrow_limit: 2}}\ndefault_queue: a",
    "queues: {a: {stopped: true, max_gpus_per_owner: 2}, b: {lend_limit: 0, nominal: 8}}\ndefault_queue: a",
    "queues: {a: , t: {nominal: 2, queues: {b: {nominal: 6, lend_limit: 3}, c: {nominal: 20}}}}\ndefault_queue: a",
    "queues: {c: }",
])  # fmt: skip
JOBS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from([0.5, 1, 2, 4, 8]), st.sampled_from(["ada", "bob"])),
    max_size=8,
)


@settings(deadline=None)
@given(POLICIES, POLICIES, JOBS)
def test_no_change_has_no_consequences_and_any_change_is_told_of_real_jobs(
    old: str, new: str, jobs: list[tuple[str, float, str]]
) -> None:
    fake = cluster()
    for queue, gpus, owner in jobs:
        fake.submit(gpus, queue=queue, owner=owner, behaviour=LONG)
    fake.apply_policy(policy(old))
    live, shapes = list(fake.state.jobs.values()), fake.state.node_shapes()
    assert consequences(live, shapes, policy(old), policy(old)) == []
    found = consequences(live, shapes, policy(old), policy(new))
    assert all(set(each.jobs) <= {job.id for job in live} and each.message for each in found)
    fake.apply_policy(policy(new))
    views = queue_views(
        fake.policy, fake.state.books.quota, fake.state.jobs.values(), fake.state.capacity.by_type()
    )
    assert sum(each.running + each.pending for each in views if each.parent is None) == len(fake.state.jobs)


# --- views ---------------------------------------------------------------------------------------------------


def test_views_of_a_tree() -> None:
    text = """
    queues:
      research:
        nominal: 2
        queues:
          nlp: {nominal: 4, weight: 2}
          vision: {nominal: 4, lend_limit: 1}
      batch: {stopped: true}
    default_queue: nlp
    """
    fake = FakeCluster(policy=policy(text))
    fake.add_node("n", 16)
    fake.submit(8, queue="nlp", behaviour=LONG)
    fake.submit(4, queue="nlp", behaviour=LONG)
    fake.submit(1, queue="batch")
    settle(fake)
    quota, by_type = fake.state.books.quota, fake.state.capacity.by_type()
    views = {each.name: each for each in queue_views(fake.policy, quota, fake.state.jobs.values(), by_type)}
    assert list(views) == ["research", "nlp", "vision", "batch"]
    assert views["research"].nominal == {"*": 10}
    assert (views["nlp"].used, views["nlp"].borrowed) == ({"*": 12}, {"*": 8})
    # 8 borrowed: 2 the team's own, 1 that vision lends, and 5 that no queue owns.
    assert views["vision"].lent == {"*": 1}
    assert (views["research"].used, views["research"].borrowed, views["research"].lent) == (
        {"*": 12},
        {"*": 5},
        {},
    )
    assert views["nlp"].share == quota.share("nlp") > 0
    assert (views["research"].running, views["research"].pending) == (2, 0)
    assert (views["batch"].pending, views["batch"].stopped, views["batch"].nominal) == (1, True, {})


def test_idle_queues_have_lent_in_proportion() -> None:
    text = "queues: {a: {nominal: 6}, b: {nominal: 3}, c: }\ndefault_queue: c"
    fake = FakeCluster(policy=policy(text))
    fake.add_node("n", 10)
    fake.submit(4, queue="c", behaviour=LONG)
    views = queue_views(
        fake.policy, fake.state.books.quota, fake.state.jobs.values(), fake.state.capacity.by_type()
    )
    assert [each.lent for each in views] == [{"*": 2}, {"*": 1}, {}]
    assert views[2].borrowed == {"*": 4}


def test_a_queue_that_is_gone_and_has_jobs_is_shown() -> None:
    fake = cluster()
    fake.submit(4, queue="b", behaviour=LONG, gpu_types=("A100",))
    settle(fake)
    fake.apply_policy(policy("queues: {a: {nominal: {A100: 1}}}"))
    views = queue_views(fake.policy, fake.state.books.quota, fake.state.jobs.values())
    assert (views[-1].name, views[-1].used, views[-1].stopped, views[-1].running) == (
        "b",
        {"A100": 4},
        True,
        1,
    )


def test_without_quotas_nobody_borrows() -> None:
    fake = cluster()
    fake.submit(4, queue="b", behaviour=LONG)
    views = queue_views(fake.policy, fake.state.books.quota, fake.state.jobs.values())
    assert [(each.used, each.borrowed, each.lent) for each in views] == [({}, {}, {}), ({"*": 4}, {}, {})]
