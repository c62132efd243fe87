"""The quota tree against the formula of its docstring, worked out naively; and the owners' decayed usage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.core.fairshare import SOON_S, Usage, soon
from rm.core.order import queue_key
from rm.core.policy import ANY, Policy, QueuePolicy
from rm.core.quota import UNLIMITED, QuotaTree
from rm.core.state import ClusterState

NAMES = ("team", "team/x", "team/y", "lone")
LEAVES = ("team/x", "team/y", "lone")
LIMIT = st.none() | st.integers(0, 6)


@st.composite
def trees(draw: st.DrawFn) -> Policy:
    queues = {}
    for name in NAMES:
        nominal, borrow, lend = draw(LIMIT), draw(LIMIT), draw(LIMIT)
        queues[name] = QueuePolicy(
            name,
            "team" if "/" in name else None,
            nominal=None if nominal is None else {ANY: nominal},
            borrow_limit=None if borrow is None else {ANY: borrow},
            lend_limit=None if lend is None else {ANY: lend},
        )
    return Policy(queues=queues, default_queue="lone")


class Naive:
    """The formula, word for word, from the usage of the leaves alone."""

    def __init__(self, policy: Policy, capacity: int, used: dict[str, int]) -> None:
        self.queues, self.capacity, self.used = policy.queues, capacity, used

    def children(self, name: str | None) -> list[str]:
        return [each for each, queue in self.queues.items() if queue.parent == name]

    def limit(self, name: str, which: str) -> int | None:
        amounts = getattr(self.queues[name], which)
        return None if amounts is None else amounts.get(ANY)

    def own(self, name: str) -> int:
        lent = sum(self.own(child) - self.local(child) for child in self.children(name))
        return (self.limit(name, "nominal") or 0) + lent

    def local(self, name: str) -> int:
        lend = self.limit(name, "lend_limit")
        return 0 if lend is None else max(0, self.own(name) - lend)

    def usage(self, name: str) -> int:
        """What it holds itself, and what its children hold beyond what they never lend."""
        return self.used.get(name, 0) + sum(self.beyond(child) for child in self.children(name))

    def beyond(self, name: str) -> int:
        return max(0, self.usage(name) - self.local(name))

    def available(self, name: str | None) -> int:
        if name is None:
            lent = sum(self.own(child) - self.local(child) for child in self.children(None))
            kept = sum(self.local(each) for each in self.queues)
            return max(lent, self.capacity - kept) - sum(self.beyond(child) for child in self.children(None))
        local_free = max(0, self.local(name) - self.usage(name))
        above, borrow = self.available(self.queues[name].parent), self.limit(name, "borrow_limit")
        if borrow is not None:
            free = (self.own(name) - self.local(name)) - max(0, self.usage(name) - self.local(name))
            above = min(above, free + borrow)
        return local_free + above


@settings(deadline=None)
@given(
    trees(), st.integers(0, 24), st.lists(st.tuples(st.sampled_from(LEAVES), st.integers(0, 5)), max_size=12)
)
def test_available_is_the_formula_after_every_change(
    policy: Policy, capacity: int, changes: list[tuple[str, int]]
) -> None:
    tree, used = QuotaTree(policy, {"A100": capacity}), dict.fromkeys(LEAVES, 0)
    limited = any(queue.nominal is not None for queue in policy.queues.values())

    def compare() -> None:
        naive = Naive(policy, capacity, used)
        for leaf in LEAVES:
            assert tree.available(leaf, ANY) == (naive.available(leaf) if limited else UNLIMITED)
            assert tree.borrowed(leaf, ANY) == max(0, used[leaf] - naive.own(leaf))
            empty = Naive(policy, capacity, {}).available(leaf)
            assert tree.most(leaf, ANY) == (empty if limited else UNLIMITED)

    compare()
    for leaf, units in changes:
        tree.add(leaf, ANY, units)
        used[leaf] += units
        compare()
    for leaf, units in changes:  # given back in the order in which it was taken, not the reverse
        tree.add(leaf, ANY, -units)
        used[leaf] -= units
        compare()
    assert not tree.usages()


@settings(deadline=None)
@given(trees(), st.lists(st.tuples(st.sampled_from(LEAVES), st.integers(1, 4)), max_size=12))
def test_who_takes_only_what_is_available_never_exceeds_a_limit(
    policy: Policy, wishes: list[tuple[str, int]]
) -> None:
    tree, used = QuotaTree(policy, {"": 12}), dict.fromkeys(LEAVES, 0)
    for leaf, units in wishes:
        if tree.available(leaf, ANY) >= units:
            tree.add(leaf, ANY, units)
            used[leaf] += units
    naive = Naive(policy, 12, used)
    if tree.limited:
        kept = sum(naive.local(each) for each in NAMES)
        lent = sum(naive.own(child) - naive.local(child) for child in naive.children(None))
        assert sum(used.values()) <= kept + max(lent, 12 - kept)
        for name in NAMES:
            borrow = naive.limit(name, "borrow_limit")
            assert borrow is None or naive.usage(name) <= naive.own(name) + borrow


def test_reclaim_is_settled_below_the_first_common_team() -> None:
    queues = {
        "t": QueuePolicy("t"),
        "x": QueuePolicy("x", "t", nominal={ANY: 2}),
        "y": QueuePolicy("y", "t", nominal={ANY: 2}),
        "z": QueuePolicy("z", nominal={ANY: 4}),
    }
    tree = QuotaTree(Policy(queues=queues, default_queue="z"), {"": 8})
    tree.add("x", ANY, 4)
    assert tree.may_reclaim("y", 2, "x", ANY)
    assert not tree.may_reclaim("y", 3, "x", ANY), "y would borrow itself"
    assert not tree.may_reclaim("z", 4, "x", ANY), "the team is within its own"
    tree.add("y", ANY, 1)
    assert tree.may_reclaim("z", 4, "x", ANY)
    assert not tree.may_reclaim("z", 4, "y", ANY), "y is within its own"
    assert not tree.may_reclaim("x", 1, "z", ANY)


@settings(deadline=None)
@given(
    st.integers(0, 40),
    st.floats(0, 100),
    st.lists(st.floats(0.1, 1e5), min_size=1, max_size=8),
    st.floats(10, 1e6),
)
def test_uneven_steps_are_one_step(
    units: int, average: float, steps: list[float], half_life_s: float
) -> None:
    """Whoever looks at it, and how often, changes nothing."""
    often, once = Usage(average, units, 0.0), Usage(average, units, 0.0)
    now = 0.0
    for step in steps:
        now += step
        often.settle(now, half_life_s)
    assert once.standing(now, half_life_s) == pytest.approx(
        often.standing(now, half_life_s), rel=1e-6, abs=1e-9
    )
    once.settle(now, half_life_s)
    assert once.average == pytest.approx(often.average, rel=1e-6, abs=1e-9)


def test_usage_halves_in_a_half_life_and_a_clock_that_goes_back_changes_nothing() -> None:
    usage = Usage()
    usage.change(8, 0.0, 100.0)
    usage.change(-8, 100.0, 100.0)
    assert usage.average == pytest.approx(4.0)
    usage.settle(200.0, 100.0)
    assert usage.average == pytest.approx(2.0)
    usage.settle(150.0, 100.0)
    assert (usage.average, usage.at) == (pytest.approx(2.0), 200.0)


def test_an_admission_counts_as_if_it_had_been_held_for_a_while() -> None:
    half_life_s = 1000.0
    usage = Usage()
    usage.change(8, 0.0, half_life_s)
    assert usage.standing(0.0, half_life_s) == pytest.approx(soon(8, half_life_s))
    later = Usage(current=8)
    later.settle(SOON_S, half_life_s)
    assert usage.standing(0.0, half_life_s) == pytest.approx(later.average)


CHANGES = st.lists(st.tuples(st.sampled_from(LEAVES), st.integers(1, 6), st.booleans()), max_size=8)


@given(trees(), CHANGES)
@settings(max_examples=100, deadline=None)
def test_a_remembered_place_among_the_queues_is_the_one_of_now(
    policy: Policy, changes: list[tuple[str, int, bool]]
) -> None:
    state, used = ClusterState(policy), dict.fromkeys(LEAVES, 0)
    for queue, units, back in changes:
        quota = state.books.quota
        change = -units if back and used[queue] >= units else units
        quota.add(queue, ANY, change)
        used[queue] += change
        fresh = ClusterState(policy)
        for each, held in used.items():
            fresh.books.quota.add(each, ANY, held)
        for each in LEAVES:
            within = quota.within(each, ANY, 1)
            assert queue_key(each, within, state) == queue_key(each, within, fresh), f"{each} after {queue}"
