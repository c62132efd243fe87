"""Which waiting jobs are worth a search for victims, and how many searches a cycle makes.

A search reads every attempt that may be stopped, so it must not be made in vain. What spares them, from cheap to dear:
a bit per shape for what each queue has a right to take at all; what is known of earlier searches, which failed and
will fail again until GPUs change hands; and a bound on what one cycle searches. Whoever is not reached waits for
the next cycle, where those that failed before him are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from rm.core.keeping import Kept
from rm.core.model import Gang, Job
from rm.core.options import Option, Options
from rm.core.outlast import Outlast, waited_long
from rm.core.policy import Order, Reclaim
from rm.core.preemption import Eviction, Victims
from rm.core.state import ClusterState

LOOKS = 1_000
"""Attempts that the searches of one cycle consider together."""
SEARCH = 20
"""What a search costs besides, in such looks."""
REMEMBERED = 1_000
"""Searches of one queue that failed; beyond that all are forgotten."""
AGAIN_S = 1.0
"""How long a search that failed is not repeated, whatever happens: on a large cluster something always does."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A search without success. The next one is in vain until GPUs change hands, or `spared_until` is over."""

    at: float
    moves: int
    spared_until: float


Search = tuple[Gang, tuple[int, int], str]
"""(gang, priority without and with age, kind): what decides, in one queue, whether victims are found."""
Failures = dict[str, dict[Search, Failed]]
"""By queue."""


class Searches:
    """The searches of one cycle. `failed`: what earlier cycles know, kept up to date here."""

    def __init__(
        self,
        state: ClusterState,
        now: float,
        options: Options,
        failed: Failures,
        wake: Callable[[float], None],
    ) -> None:
        self._state = state
        self._options = options
        self._now = now
        self._failed = failed
        self._wake = wake
        self._spared_until = inf
        self._ranked = state.policy.order is Order.SHORTEST_FIRST
        self._victims = Victims(state, now, self._spare)
        self._outlast: Outlast | None = None
        self._made = 0
        self._masks: Mapping[str, int] | None = None
        self._in_vain: set[tuple[object, ...]] = set()
        """With `shortest_first`: whoever comes behind with as good a claim has a worse rank."""
        self._vain: dict[str, int] = {}
        self._lawful: dict[str, int] | None = None
        self._reclaimers: dict[str, int] = {}
        """Queues that may take back what others borrow → the shapes that may evict for another reason."""

    @property
    def exhausted(self) -> bool:
        """Whether this cycle searches no more."""
        return self._made * SEARCH + self._victims.looked >= LOOKS

    def may_find(self) -> bool:
        """Whether anybody might still find victims."""
        return not self.exhausted and bool(self._all_masks())

    def mask(self, queue: str) -> int:
        """The bits of the shapes whose jobs might have somebody evicted. Never leaves one out that could."""
        mask = 0 if self.exhausted else self._all_masks().get(queue, 0)
        if mask and not self._ranked and queue in self._reclaimers:
            # What is kept for the first of a queue is charged to it: the next has less to claim.
            mask &= self._reclaimers[queue] | self._within(queue)
        return mask and mask & ~self._in_vain_for(queue)

    def unreached(self, job: Job, options: Sequence[Option]) -> bool:
        """Whether victims would have been sought for the job, had the bound not been reached before."""
        group = self._state.pending.group_of(job.id)
        if not self.exhausted or group is None:
            return False
        if not self._all_masks().get(job.queue, 0) & group.shape.bit:
            return False
        if self._ranked:
            return all(self._claim(job, each) not in self._in_vain for each in options)
        failures = self._failed.get(job.queue, {})
        known = [failures.get(self._search(job, each)) for each in options]
        return not all(each is not None and self._fails_again(each) for each in known)

    def evict(self, job: Job, option: Option, kept: Kept, stopped: dict[str, None]) -> Eviction | None:
        """The victims for `job` on one option, or None where there are none or the search is not worth it."""
        found = self._by_right(job, option, kept, stopped) if self._all_rights().get(job.queue) else None
        return self._by_rank(job, option, kept, stopped) if found is None and self._ranked else found

    def _by_right(self, job: Job, option: Option, kept: Kept, stopped: dict[str, None]) -> Eviction | None:
        search = self._search(job, option)
        failures = self._failed.setdefault(job.queue, {})
        failed = failures.get(search)
        if failed is not None and self._fails_again(failed) and job.queue not in self._victims.elastic_queues:
            return None
        self._made += 1
        self._spared_until = inf
        found = self._victims.evict(job, option.kind, option.classes, kept.promised(stopped))
        if found is None:
            if len(failures) >= REMEMBERED:
                failures.clear()
            failures[search] = Failed(self._now, self._state.books.moves, self._spared_until)
            self._vain.pop(job.queue, None)
        return found

    def _by_rank(self, job: Job, option: Option, kept: Kept, stopped: dict[str, None]) -> Eviction | None:
        same = self._claim(job, option)
        if same in self._in_vain:
            return None
        self._made += 1
        if self._outlast is None:
            self._outlast = Outlast(self._state, self._now)
        found = self._outlast.evict(job, option.kind, option.classes, kept.promised(stopped), kept.fresh)
        if found is None:
            self._in_vain.add(same)
        return found

    def _in_vain_for(self, queue: str) -> int:
        """The bits of the shapes that are known to find nobody, whoever of the queue asks."""
        known = self._vain.get(queue)
        if known is None:
            known = 0
            # Who may shrink an elastic gang depends on the owners, and who may evict may depend on the priority.
            if (
                not self._ranked
                and not self._by_priority(queue)
                and queue not in self._victims.elastic_queues
            ):
                kinds: dict[Gang, int] = {}
                for (gang, _, _), failed in self._failed.get(queue, {}).items():
                    if self._fails_again(failed):
                        kinds[gang] = kinds.get(gang, 0) + 1
                for gang, count in kinds.items():
                    shape = self._state.pending.shapes.get(gang)
                    if shape is not None and count >= len(self._options.of(queue, gang)):
                        known |= shape.bit
            self._vain[queue] = known
        return known

    def _search(self, job: Job, option: Option) -> Search:
        group = self._state.pending.group_of(job.id)
        lifted = group.priority if group is not None else job.priority
        return job.gang, (job.priority, lifted) if self._by_priority(job.queue) else (0, 0), option.kind

    def _claim(self, job: Job, option: Option) -> tuple[object, ...]:
        return job.queue, job.gang, option.kind, job.priority, waited_long(job, self._now, self._state)

    def _by_priority(self, queue: str) -> bool:
        rules = self._state.policy.queues[queue]
        return rules.preempts or rules.reclaim is Reclaim.LOWER

    def _fails_again(self, failed: Failed) -> bool:
        """Also asks for a cycle at the time when that may have changed."""
        if failed.moves == self._state.books.moves:
            if failed.spared_until < inf:
                self._wake(failed.spared_until)
            return self._now < failed.spared_until
        if failed.at <= self._now < failed.at + AGAIN_S:
            self._wake(failed.at + AGAIN_S)
            return True
        return False

    def _spare(self, until: float) -> None:
        self._spared_until = min(self._spared_until, until)
        self._wake(until)

    def _all_masks(self) -> Mapping[str, int]:
        """By queue, as things were when the cycle began: during a cycle rights only get fewer."""
        if self._masks is None:
            rights = self._all_rights()
            self._masks = rights
            if self._ranked and self._state.books.evictable:
                self._masks = self._state.pending.masks
        return self._masks

    def _all_rights(self) -> dict[str, int]:
        """The same, whatever the order."""
        if self._lawful is None:
            borrowers = self._borrowers()
            rules = self._state.policy.queues.values()
            anybody = borrowers or self._victims.elastic_queues or any(each.preempts for each in rules)
            queues = self._state.pending.groups if anybody else ()
            rights = {queue: self._rights(queue, borrowers) for queue in queues}
            self._lawful = {queue: mask for queue, mask in rights.items() if mask}
        return self._lawful

    def _rights(self, queue: str, borrowers: set[str]) -> int:
        state = self._state
        rules = state.policy.queues.get(queue)
        if rules is None:
            return 0
        every, evictable = state.pending.masks[queue], state.books.evictable
        mask = 0
        if queue in self._victims.elastic_queues:
            mask = every
        elif rules.preempts and queue in evictable:
            lowest = min(evictable[queue])
            for lane in state.pending.lanes[queue].values():
                if lane.priority > lowest:
                    mask |= lane.mask
        if rules.reclaims and borrowers - {queue}:
            self._reclaimers[queue] = mask
            mask |= self._within(queue)
        return mask & every

    def _within(self, queue: str) -> int:
        """The bits of the shapes that would keep the queue within what it owns."""
        quota = self._state.books.quota
        most = max(quota.most_within(queue, kind) for kind in quota.every_kind)
        return self._state.pending.no_larger(most)

    def _borrowers(self) -> set[str]:
        books, queues = self._state.books, self._state.policy.queues
        if not books.quota.limited:
            return set()
        return {
            queue
            for queue in books.evictable
            if queue in queues and any(books.quota.borrows(queue, kind) for kind in books.quota.every_kind)
        }
