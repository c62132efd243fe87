"""What queues own and have lent: the bookkeeping adds up on any tree."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rm.core.policy import ANY, Policy, QueuePolicy
from rm.core.quota import ROOT, QuotaTree
from rm.lending import Owned, lent, owned

amounts = st.one_of(st.none(), st.integers(0, 6))
rows = st.lists(
    st.tuples(st.sampled_from(["", "t", "u"]), amounts, amounts, st.integers(0, 9)), min_size=1, max_size=6
)


def tree(queues: list[tuple[str, int | None, int | None, int]], team: int | None) -> Policy:
    def by_kind(units: int | None) -> dict[str, int] | None:
        return None if units is None else {ANY: units}

    found = {"t": QueuePolicy("t", nominal=by_kind(team)), "u": QueuePolicy("u", "t")}
    for place, (parent, nominal, lend, _) in enumerate(queues):
        name = f"q{place}"
        found[name] = QueuePolicy(name, parent or None, by_kind(nominal), lend_limit=by_kind(lend))
    return Policy(queues=found, default_queue="q0")


def test_what_a_team_owns_is_its_own_and_what_is_lent_to_it() -> None:
    policy = tree([("t", 6, 2, 0), ("t", 4, None, 0), ("", 3, 0, 0)], 5)
    found = owned(policy)
    assert found["q0", ANY] == Owned(6, 4)
    assert found["q1", ANY] == Owned(4, 0)
    assert found["t", ANY] == Owned(5 + 2 + 4, 0)
    assert found["q2", ANY] == Owned(3, 3)


@settings(deadline=None)
@given(rows, amounts, st.integers(0, 40))
def test_all_that_is_borrowed_comes_from_somebody(
    queues: list[tuple[str, int | None, int | None, int]], team: int | None, capacity: int
) -> None:
    policy = tree(queues, team)
    quota = QuotaTree(policy, {"": capacity})
    for place, (*_, used) in enumerate(queues):
        quota.add(f"q{place}", ANY, used)
    owns, gave = owned(policy), lent(policy, quota, {"": capacity})
    for (name, kind), units in gave.items():
        mine = owns[name, kind]
        assert 0 < units <= mine.lendable - max(0, quota.usage(name, kind) - mine.kept)
        assert not quota.borrowed(name, kind)
    top = [name for name, queue in policy.queues.items() if queue.parent is None]
    lendable = sum(owns[name, ANY].lendable for name in top)
    nobodys = max(0, capacity - lendable - sum(each.kept for each in owns.values()))
    borrowed = sum(quota.borrowed(name, ANY) for name in top)
    given_away = sum(gave.get((name, ANY), 0) for name in top)
    assert given_away <= max(0, borrowed - nobodys), "what nobody owns goes first"
    if quota.usage(ROOT, ANY) <= lendable + nobodys:
        assert given_away == max(0, borrowed - nobodys)
