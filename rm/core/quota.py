"""The quota tree: what each queue may still use, per kind of GPU.

After Kueue's cohorts (`pkg/cache/scheduler/resource_node.go` and its documentation). For a node with quota Q
(own nominal plus what the children lend), lend limit L, borrow limit B and usage U:

    local      = max(0, Q - L) if L is set, else 0          what it never lends
    local_free = max(0, local - U)
    available  = Q - U at the root; else local_free + min(available(parent), Q - local - max(0, U - local) + B)

and usage beyond `local_free` goes on to the parent. The root is the whole cluster. What no queue owns belongs to
it, so that GPUs outside all quotas can be borrowed and are never idle for a formality. Where no queue of the tree
has a nominal quota nothing is limited, and the tree only counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rm.core.policy import ANY, Policy

ROOT = ""
UNLIMITED = 1 << 60


class _Tally:
    """One node of the tree for one kind. Amounts are GPU units."""

    __slots__ = ("borrow", "local", "name", "nominal", "parent", "quota", "usage")

    def __init__(self, name: str, parent: _Tally | None, nominal: int, borrow: int | None) -> None:
        self.name = name
        self.parent = parent
        self.nominal = nominal
        self.borrow = borrow
        self.quota = nominal
        self.local = 0
        self.usage = 0

    @property
    def local_free(self) -> int:
        return max(0, self.local - self.usage)

    def available(self) -> int:
        if self.parent is None:
            return self.quota - self.usage
        above = self.parent.available()
        if self.borrow is not None:
            lent_free = self.quota - self.local - max(0, self.usage - self.local)
            above = min(above, lent_free + self.borrow)
        return self.local_free + above

    def most(self) -> int:
        """`available` if nothing were in use."""
        if self.parent is None:
            return self.quota
        above = self.parent.most()
        if self.borrow is not None:
            above = min(above, self.quota - self.local + self.borrow)
        return self.local + above

    def add(self, units: int) -> None:
        beyond = units - self.local_free if units > 0 else units
        if units < 0:
            # The inverse of adding: what was counted above comes back first.
            beyond = -min(-units, max(0, self.usage - self.local))
        self.usage += units
        if self.parent is not None and (beyond > 0 if units > 0 else beyond < 0):
            self.parent.add(beyond)


class QuotaTree:
    """Usage and limits of every queue. Changed by `add` alone; the cycle's trial adds and takes back."""

    def __init__(self, policy: Policy, capacity: Mapping[str, int] | None = None) -> None:
        """`capacity`: GPU units by type that the cluster has or could launch."""
        self._policy = policy
        self.kinds = policy.kinds()
        self.limited = any(queue.nominal is not None for queue in policy.queues.values())
        self._capacity: dict[str, int] = {}
        self._trees: dict[str, dict[str, _Tally]] = {}
        self._paths: dict[str, tuple[str, ...]] = {}
        self._places: dict[str, dict[tuple[bool, ...], tuple[object, ...]]] = {}
        self._lent: dict[str, tuple[int, int]] = {}
        """Kind → what all queues lend together, and what they keep for themselves."""
        self.resize(capacity or {})

    def resize(self, capacity: Mapping[str, int]) -> None:
        """The cluster has, or could launch, these units by GPU type."""
        self._places.clear()
        self._capacity = {}
        for gpu_type, units in capacity.items():
            kind = self.kind(gpu_type)
            self._capacity[kind] = self._capacity.get(kind, 0) + units
        for kind, tree in self._trees.items():
            self._resize_root(kind, tree[ROOT])

    def kind(self, gpu_type: str | None) -> str:
        """The name under which quotas count this GPU type."""
        return gpu_type if gpu_type in self.kinds else ANY

    def available(self, queue: str, kind: str) -> int:
        """Units that the queue may still take, borrowing included. May be negative after a change of limits."""
        if not self.limited:
            return UNLIMITED
        return self._tree(kind)[queue].available()

    def nominal(self, queue: str, kind: str) -> int:
        """What the queue owns; 0 where it owns nothing."""
        return self._tree(kind)[queue].nominal

    def usage(self, queue: str, kind: str) -> int:
        return self._tree(kind)[queue].usage

    def borrowed(self, queue: str, kind: str) -> int:
        """Units in use above what the queue owns (with what its children own)."""
        tally = self._tree(kind)[queue]
        return max(0, tally.usage - tally.quota)

    def most(self, queue: str, kind: str) -> int:
        """What the queue could hold if nothing else ran."""
        return self._tree(kind)[queue].most() if self.limited else UNLIMITED

    def within(self, queue: str, kind: str, units: int) -> tuple[bool, ...]:
        """From the top of the tree down to the queue: who stays within what it owns if the queue takes `units`."""
        levels: list[bool] = []
        tally: _Tally = self._tree(kind)[queue]
        while tally.parent is not None:
            levels.append(tally.usage + units <= tally.quota)
            units = max(0, units - tally.local_free)
            tally = tally.parent
        return tuple(reversed(levels))

    def most_within(self, queue: str, kind: str) -> int:
        """The most units that the queue may take and somebody on its path stays within what it owns."""
        tally: _Tally = self._tree(kind)[queue]
        most, passed = -1, 0
        while tally.parent is not None:
            most = max(most, passed + tally.quota - tally.usage)
            passed += tally.local_free
            tally = tally.parent
        return most

    def borrows(self, queue: str, kind: str) -> bool:
        """Whether the queue uses more than it owns."""
        tally: _Tally = self._tree(kind)[queue]
        return tally.usage > tally.quota

    def may_reclaim(self, queue: str, units: int, from_queue: str, kind: str) -> bool:
        """Whether `units` more of `queue` have a better right than what `from_queue` holds.

        Compared below the first team that both belong to: the one side borrows from it all the way down to the
        victim's queue, the other stays within what it owns at some level. What a team's queues borrow from each
        other is thus theirs to settle, and a team within its own loses nothing to another.
        """
        mine, theirs = self.path(queue), self.path(from_queue)
        shared = 0
        while shared < min(len(mine), len(theirs)) and mine[shared] == theirs[shared]:
            shared += 1
        tree = self._tree(kind)
        if any(tree[name].usage <= tree[name].quota for name in theirs[shared:]):
            return False
        return any(self.within(queue, kind, units)[shared:])

    @contextmanager
    def tried(self, charges: list[tuple[str, str, int]]) -> Iterator[None]:
        """With these charged, (queue, kind, units) each; taken back at the end with what was appended meanwhile."""
        for charge in charges:
            self.add(*charge)
        try:
            yield
        finally:
            for queue, kind, units in reversed(charges):
                self.add(queue, kind, -units)

    @property
    def every_kind(self) -> tuple[str, ...]:
        """The kinds that quotas name, and the one of all others."""
        return (*self.kinds, ANY)

    def most_available(self, queue: str) -> int:
        """Units of any one kind that the queue may still take."""
        return max(self.available(queue, kind) for kind in self.every_kind)

    def add(self, queue: str, kind: str, units: int) -> None:
        """Charge `units` (negative: give back)."""
        if len(self.path(queue)) > 1:
            self._places.clear()  # others stand below the same teams
        else:
            self._places.pop(queue, None)
        self._tree(kind)[queue].add(units)

    def places(self, queue: str) -> dict[tuple[bool, ...], tuple[object, ...]]:
        """What `order.queue_key` has worked out for the queue; forgotten when a share on its path may change."""
        return self._places.setdefault(queue, {})

    def share(self, queue: str) -> float:
        """Weighted share: borrowed × 1000 / lendable, the largest over kinds, divided by the weight."""
        policy = self._policy.queues[queue]
        worst = 0.0
        for tree in self._trees.values():
            tally = tree[queue]
            borrowed = tally.usage - tally.quota
            if borrowed > 0:
                lendable = max(1, tree[ROOT].quota)
                worst = max(worst, borrowed * 1000 / lendable)
        return worst / policy.weight

    def share_of_nominal(self, queue: str) -> float:
        """Allocated / nominal, the largest over kinds: the tie-break of queues that do not borrow."""
        worst = 0.0
        for tree in self._trees.values():
            tally = tree[queue]
            if tally.nominal:
                worst = max(worst, tally.usage / tally.nominal)
        return worst

    def path(self, queue: str) -> tuple[str, ...]:
        """The queue's ancestors from the top down, itself last."""
        known = self._paths.get(queue)
        if known is None:
            parent = self._policy.queues[queue].parent
            known = self._paths[queue] = (*(self.path(parent) if parent is not None else ()), queue)
        return known

    def usages(self) -> dict[tuple[str, str], int]:
        """(queue, kind) → units, without zeros: what `ClusterState.check` compares."""
        return {
            (name, kind): tree[name].usage
            for kind, tree in self._trees.items()
            for name in self._policy.leaves()
            if tree[name].usage
        }

    def _tree(self, kind: str) -> dict[str, _Tally]:
        tree = self._trees.get(kind)
        if tree is None:
            tree = self._trees[kind] = self._grow(kind)
        return tree

    def _grow(self, kind: str) -> dict[str, _Tally]:
        queues = self._policy.queues
        root = _Tally(ROOT, None, 0, None)
        tree: dict[str, _Tally] = {ROOT: root}

        def tally_of(name: str) -> _Tally:
            if name not in tree:
                queue = queues[name]
                parent = tally_of(queue.parent) if queue.parent is not None else root
                nominal = (queue.nominal or {}).get(kind, 0)
                borrow = None if queue.borrow_limit is None else queue.borrow_limit.get(kind)
                tree[name] = _Tally(name, parent, nominal, borrow)
            return tree[name]

        for name in queues:
            tally_of(name)
        # From the leaves up: what a queue lends is its parent's quota.
        for name in sorted(queues, key=lambda each: -len(self.path(each))):
            tally, limits = tree[name], queues[name].lend_limit
            lend = None if limits is None else limits.get(kind)
            if lend is not None:
                tally.local = max(0, tally.quota - lend)
            assert tally.parent is not None
            tally.parent.quota += tally.quota - tally.local
        self._lent[kind] = root.quota, sum(tally.local for tally in tree.values())
        self._resize_root(kind, root)
        return tree

    def _resize_root(self, kind: str, root: _Tally) -> None:
        lent, kept = self._lent[kind]
        root.quota = max(lent, self._capacity.get(kind, 0) - kept)
