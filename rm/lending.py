"""What each queue owns, keeps to itself, and has lent at this moment. For people: no decision depends on it.

The arithmetic is `rm.core.quota`'s; it is asked, not repeated. Whose GPUs a borrower uses is a matter of
bookkeeping, since the tree only knows sums. Here what nobody owns goes first (at the root), or what the team owns
itself (below it); then what idle queues lend, in proportion to how much of it is idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rm.core.policy import ANY, Policy
from rm.core.quota import ROOT, QuotaTree

_PROBE = 1 << 50
"""More units than any queue owns."""


@dataclass(frozen=True, slots=True)
class Owned:
    """One queue and kind, in units. `quota`: own nominal and what the queues below lend. `kept`: never lent."""

    quota: int
    kept: int

    @property
    def lendable(self) -> int:
        return self.quota - self.kept


def owned(policy: Policy) -> dict[tuple[str, str], Owned]:
    """By queue and kind, for every kind that the policy knows."""
    tree, found = QuotaTree(policy), {}
    for kind in (ANY, *sorted(policy.kinds())):
        for name, queue in policy.queues.items():
            # Using far more than it owns: what exceeds its quota is borrowed, what reaches its parent is not kept.
            tree.add(name, kind, _PROBE)
            quota = _PROBE - tree.borrowed(name, kind)
            kept = _PROBE - tree.usage(queue.parent or ROOT, kind)
            tree.add(name, kind, -_PROBE)
            found[name, kind] = Owned(quota, kept)
    return found


def lent(
    policy: Policy, quota: QuotaTree, capacity: Mapping[str, int] | None = None
) -> dict[tuple[str, str], int]:
    """Units of each queue that others use now, without zeros. `capacity`: units by GPU type that the cluster has."""
    book = _Book(policy, quota, owned(policy))
    for kind in (ANY, *sorted(policy.kinds())):
        has = sum(units for gpu_type, units in (capacity or {}).items() if quota.kind(gpu_type) == kind)
        owns = sum(
            each.lendable for (name, of), each in book.owned.items() if of == kind and book.is_top(name)
        )
        keeps = sum(each.kept for (_, of), each in book.owned.items() if of == kind)
        book.settle(None, kind, own=max(0, has - keeps - owns), out=0)
    return {key: units for key, units in book.lent.items() if units}


class _Book:
    """Settles one team after the other, from the top down."""

    def __init__(self, policy: Policy, quota: QuotaTree, owned_: Mapping[tuple[str, str], Owned]) -> None:
        self.lent: dict[tuple[str, str], int] = {}
        self.owned = owned_
        self._quota = quota
        self._policy = policy
        self._below: dict[str | None, list[str]] = {}
        for name, queue in policy.queues.items():
            self._below.setdefault(queue.parent, []).append(name)

    def is_top(self, name: str) -> bool:
        return self._policy.queues[name].parent is None

    def settle(self, team: str | None, kind: str, own: int, out: int) -> None:
        """`own`: units that no queue of the team owns. `out`: what goes from the team to others."""
        names = self._below.get(team, [])
        idle = {name: self._idle(name, kind) for name in names}
        wanted = out + sum(self._quota.borrowed(name, kind) for name in names)
        given = min(max(0, wanted - own), sum(idle.values()))
        for name, units in _in_proportion(given, idle).items():
            self.lent[name, kind] = units
            nominal = (self._policy.queues[name].nominal or {}).get(kind, 0)
            self.settle(name, kind, nominal, units)

    def _idle(self, name: str, kind: str) -> int:
        mine = self.owned[name, kind]
        return max(0, mine.lendable - max(0, self._quota.usage(name, kind) - mine.kept))


def _in_proportion(amount: int, weights: Mapping[str, int]) -> dict[str, int]:
    """`amount` cut by weight into whole numbers; what is left over goes to the first ones."""
    total = sum(weights.values())
    parts = {name: amount * weight // total if total else 0 for name, weight in weights.items()}
    left = amount - sum(parts.values())
    for name, weight in weights.items():
        more = min(left, weight - parts[name])
        parts[name] += more
        left -= more
    return parts
