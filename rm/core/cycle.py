"""What to do next: one walk over the waiting jobs in order, as a value.

    schedule(state, now):
      1. let in the jobs whose pause is over or whose age lifts them
      2. walk the queues in order, and in each queue its groups of interchangeable jobs in order (`order`)
      3. for the job at the head of a group, try its GPU types in its order: quota, then a place (`options`)
      4. it fits: admit it, charge the trial, and go on with the queue that is first now
      5. its quota is used up: pass over it; others of the queue may ask for less
      6. it has no place: if GPUs are on the way back already, or somebody may be evicted for it (`preemption`),
         those are kept for it; else the first such job gets a reservation (`backfill`), be it that it waits for nodes
         that boot. Whatever is kept for it is gone for everybody behind, unless they end in time
      7. write down why each job that was looked at for the first time waits

The naive semantics is a walk over every job. It is kept, and its cost avoided, by three facts: jobs of one group
cannot be told apart; during a cycle GPUs only get fewer, so what did not fit once need not be tried again (a bit
per shape); and when no waiting shape fits and nobody may be evicted there is nothing to do at all.

The plan is a list of events, in order: the writer applies and commits them like any others. Trials are made on the
state's own index and rolled back, so `schedule` leaves no trace but its notes, which are a cache. A second cycle at
the same state and time plans nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import Self

from rm.core.backfill import reserve, still_good
from rm.core.books import START_S
from rm.core.boots import Boots
from rm.core.events import AvailabilityChecked, JobAdmitted, StopRequested
from rm.core.explain import reason_of
from rm.core.keeping import Kept
from rm.core.model import Gang, Job, PlacedBundle
from rm.core.options import Option, Options
from rm.core.order import FairLine, Given, Line, RankedLine, Turn, borrowing, queue_key
from rm.core.outlast import LOOK_AGAIN_S, waited_long
from rm.core.pending import Group
from rm.core.placement import feasible, may_fit, place_elastic
from rm.core.policy import Backfill, Order
from rm.core.quota import UNLIMITED
from rm.core.reasons import Reason
from rm.core.reservations import Promised, Reservation, class_ids, end_if_started, lives
from rm.core.searches import AGAIN_S, Failures, Searches
from rm.core.state import ClusterState
from rm.core.transit import Transit, fitting

KEPT_COMING = 16
"""Jobs in one walk for which what is on its way back is kept, beyond those that would evict somebody else for it."""
REASONS = 50
"""Different reasons that one cycle works out. After a flood of submissions the next cycles go on with it."""
CHECKS = 1_000
"""Jobs for which one cycle writes a reason down, for the same cause: each is a row of the ledger."""
NEXT_REASONS_S = 0.05
MOST_PASSES = 8
"""Walks in one cycle: each admission may change the order, and with it who should have been reserved for."""
EVERY = -1
"""The bits of all shapes."""
FEW_NEW = 16
"""New jobs up to which it is worth to ask each whether it could start, before all are asked."""
FEW = 64
"""Admissions in one cycle up to which it pays to ask after each one what still fits."""
BACKFILL_DEPTH = 100
"""Jobs of one group that are asked whether they end before a reservation is due."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions of one cycle, in order."""

    events: tuple[AvailabilityChecked | JobAdmitted | StopRequested, ...]


@dataclass(frozen=True, slots=True)
class Quiet:
    """A cycle that decided nothing. Until something moves, the next one would not either, but for new jobs.

    `lifted`: `Pending.lifted` then. `kept_quota`: by job, what its reservation is charged.
    """

    lifted: int
    wake: float | None
    kept_quota: Mapping[str, tuple[str, str, int]]
    first_blocked: Job | None
    bounds: frozenset[str]


class Notes:
    """What one cycle tells the next. May be thrown away at any time."""

    def __init__(self, state: ClusterState) -> None:
        self.class_version = state.capacity.class_version
        self.options = Options(state)
        self.reservations: dict[str, Reservation] = {}
        self.feasible: dict[tuple[str, Gang], tuple[int, bool]] = {}
        self.failed: Failures = {}
        self.quiet: Quiet | None = None
        self.moves = -1
        """`Books.moves` when the reservations were made."""
        self.gains = -1
        """`Books.gains` then."""
        self.came = (-1, -1)
        """`_came` then."""


def schedule(state: ClusterState, now: float) -> Plan:
    """Decide who starts now and who is stopped for it."""
    cycle = Cycle(state, now)
    with cycle:
        cycle.walk()
        return cycle.plan()


def why(state: ClusterState, job: Job, now: float) -> Reason:
    """The present reason of a queued job, with fresh evidence. For readers; the cycle doesn't need it."""
    return why_each(state, (job,), now)[job.id]


def why_each(state: ClusterState, jobs: Iterable[Job], now: float) -> dict[str, Reason]:
    """As `why`, for many jobs after one walk."""
    with Cycle(state, now, for_readers=True) as cycle:
        cycle.walk()
        return {job.id: reason_of(cycle, job) for job in jobs}


class Cycle:
    """One cycle's trial. `why` runs one too, and `explain` looks at it before it is rolled back."""

    def __init__(self, state: ClusterState, now: float, *, for_readers: bool = False) -> None:
        self.state = state
        self.now = now
        self._for_readers = for_readers
        self.notes = _notes(state)
        self.kept = Kept(state, now)
        self.boots = Boots(state, now, self.kept)
        self.admitted: dict[str, JobAdmitted] = {}
        self.first_blocked: Job | None = None
        self.closed: dict[int, Job] = {}
        """With backfill `none`: node classes that a blocked job keeps to itself."""
        self.bounds: set[str] = set()
        """Bounds that this cycle hit: `passes`, `backfill_depth`, `evictions_per_cycle`."""
        self._events: list[JobAdmitted | StopRequested] = []
        self._given = Given(state, now)
        self._quota_trial: list[tuple[str, str, int]] = []
        self._full: set[tuple[str, str, Gang]] = set()
        """(queue, owner, gang) that got nothing: during a cycle GPUs and quota only get fewer."""
        self._hopeless: set[tuple[str, str, Gang, tuple[int, bool]]] = set()
        """The same for whom nothing could be kept: whoever comes behind has no better right to it."""
        self._full_in_time: set[tuple[str, str, Gang]] = set()
        """The same where jobs that end in time may look."""
        self._fit = self._fit_in_time = 0
        """Bits of the shapes that may still fit: as things are, and where jobs that end in time may look."""
        failed = self.notes.failed
        if for_readers:
            failed = {queue: dict(known) for queue, known in failed.items()}
        self._searches = Searches(state, now, self.notes.options, failed, self.wake_at)
        self._stopped: dict[str, None] = {}
        self._evicting: set[str] = set()
        self._claims = self._gone_for()
        """Who comes first because others were stopped for it."""
        self._kept_quota: dict[str, tuple[str, str, int]] = {}
        self._patient: set[int] = set()
        """Node classes on which the first blocked job lets others pass for now."""
        self._gangs_served: set[str] = set()
        """Gangs that were served before others in this walk: what they did not get then they get no more."""
        self._earlier: dict[str, Reservation] = {}
        """What the last walk of this cycle kept, and had to forget."""
        self._kept_coming = 0
        self._kept_version = 0
        """Grows whenever what is kept changes, or who is stopped."""
        self._cover: tuple[int, bool] | None = None
        self._coming: Transit | None = None
        self._loosened = False
        """Whether an admission of this walk has made a hold smaller: somebody ahead of it may fit now."""
        self._overtaken = False
        """Whether something is kept for somebody who by now may come after another, for what this walk admitted."""
        self._wake: float | None = None

    def __enter__(self) -> Self:
        self.state.pending.advance(self.now, self.state.jobs)
        self._mark = self.state.capacity.mark()
        return self

    def __exit__(self, *_: object) -> None:
        self.state.capacity.rollback(self._mark)
        for queue, kind, units in reversed(self._quota_trial):
            self.state.books.quota.add(queue, kind, -units)
        if self.state.policy.order is Order.SHORTEST_FIRST and self.state.pending.groups:
            self.wake_at(self.now + LOOK_AGAIN_S)
        elif self._searches.exhausted:
            self.wake_at(self.now + AGAIN_S)
        if not self._for_readers:
            self.notes.reservations = self.kept.reservations
            self.notes.moves = self.state.books.moves
            self.notes.gains = self.state.books.gains
            self.notes.came = _came(self.state)
            self.notes.quiet = None if self.admitted or self._stopped else self._quiet()
            self.state.wake_at = self._wake

    def plan(self) -> Plan:
        """The decisions, with a check in front of each admission and of each job seen for the first time."""
        events: list[AvailabilityChecked | JobAdmitted | StopRequested] = []
        known: dict[tuple[object, ...], Reason] = {}
        for job_id in self.state.books.unchecked:
            if job_id in self.admitted:
                continue
            job = self.state.jobs[job_id]
            key = self._alike(job)
            if key not in known:
                if len(known) == REASONS:
                    self.wake_at(self.now + NEXT_REASONS_S)
                    break
                known[key] = reason_of(self, job)
            if len(events) == CHECKS:
                self.wake_at(self.now + NEXT_REASONS_S)
                break
            events.append(AvailabilityChecked(self.now, job_id, known[key]))
        for event in self._events:
            if isinstance(event, JobAdmitted):
                events.append(AvailabilityChecked(self.now, event.job_id, None))
            events.append(event)
        return Plan(tuple(events))

    def _alike(self, job: Job) -> tuple[object, ...]:
        """What jobs have in common that wait for the same reason."""
        if job.id in self.kept.reservations:
            return (job.id,)
        rules = self.state.policy.queues.get(job.queue)
        owner = job.owner if rules is not None and rules.max_gpus_per_owner is not None else ""
        alike = job.queue, owner, job.gang, job.held, job.after, job.eligible_at > self.now
        # Whether a bound cut it off depends on more.
        return (*alike, job.priority, job.time_limit_s, job.grace_s) if self.bounds else alike

    # --- the walk ------------------------------------------------------------------------------------------

    def walk(self) -> None:
        """Steps 2 to 6."""
        state = self.state
        queues = [queue for queue in state.pending.groups if self.open(queue)]
        if not len(state.capacity) or not queues or self._nothing_new():
            return
        for _ in range(MOST_PASSES):
            self._loosened = self._overtaken = False
            self._pass(queues)
            if self._searches.exhausted:
                self.bounds.add("evictions_per_cycle")
            if not self._loosened and not (self._overtaken and (self.kept.holds or self.closed)):
                return
            self._start_over()
        self.bounds.add("passes")

    # --- when nothing has happened since a cycle that decided nothing -----------------------------------------

    def _quiet(self) -> Quiet:
        state = self.state
        return Quiet(
            state.pending.lifted, self._wake, dict(self._kept_quota), self.first_blocked,
            frozenset(self.bounds),
        )  # fmt: skip

    def _nothing_new(self) -> bool:
        """Whether there are only new jobs since such a cycle, and none of them could start. What was kept is kept on.

        With many submissions and a full cluster this is the common case. Where no free GPUs are kept for anybody, a
        new job that would get the reservation gets it in the next cycle after GPUs have changed hands: until then
        nobody starts in either case. It is the same with a job that has just waited for so long that it comes before
        others.
        """
        quiet = self.notes.quiet
        if quiet is None or self._for_readers or not self._still(quiet):
            return False
        if self.state.launches.types:
            return False  # whether nodes are launched for a new job depends on the date that it would get
        lifted = self.state.pending.lifted_since(quiet.lifted)
        if lifted is None:
            return False
        reservations = self.notes.reservations
        if any(self.state.pending.group_of(job_id) is None for job_id in reservations):
            return False
        new = (*self.state.books.unchecked, *lifted)
        preceded = False
        for job_id, reservation in reservations.items():
            preceded = preceded or any(self._may_precede(each, job_id) for each in new)
            self._charge(*quiet.kept_quota[job_id])
            self._kept_quota[job_id] = quiet.kept_quota[job_id]
            self.kept.keep(reservation)
        if (preceded and self.kept.holds) or any(self._may_start(job_id) for job_id in new):
            self._start_over()
            return False
        self.first_blocked = quiet.first_blocked
        self.bounds = set(quiet.bounds)
        self._wake = quiet.wake
        return True

    def _still(self, quiet: Quiet) -> bool:
        state = self.state
        return (
            self.notes.moves == state.books.moves
            and (quiet.wake is None or quiet.wake > self.now)
            and state.policy.backfill is not Backfill.NONE
            and state.policy.order is not Order.SHORTEST_FIRST
            and not state.books.ending
            and len(state.books.unchecked) <= FEW_NEW
            and all(each.at >= self.now for each in self.notes.reservations.values())
        )

    def _may_start(self, job_id: str) -> bool:
        """Whether a new job might start beside what is kept for others, or have somebody evicted."""
        pending = self.state.pending
        group, gang = pending.group_of(job_id), self.state.jobs[job_id].gang
        if group is None:
            return False
        if may_fit(gang, self.state.capacity.matching(gang)) or group.shape.bit & self._searches.mask(
            group.queue
        ):
            return True
        dated = any(each.at < inf for each in self.kept.reservations.values())
        return dated and end_if_started(self.state.jobs[job_id], self.state, self.now) < inf

    def _may_precede(self, job_id: str, other_id: str) -> bool:
        """Whether a new job might come before one for which something is kept. Never says no where it does."""
        pending, jobs = self.state.pending, self.state.jobs
        group, other = pending.group_of(job_id), pending.group_of(other_id)
        if group is None or other is None:
            return False
        mine, theirs = jobs[job_id], jobs[other_id]
        if self.state.policy.order is not Order.FAIR:
            place = (*self._before(Turn(group)), -group.priority, mine.seq)
            return place < (*self._before(Turn(other)), -other.priority, theirs.seq)
        if mine.queue != theirs.queue:
            return self._queue_key(mine.queue, None) < self._queue_key(theirs.queue, other)
        standing = self._given.standing
        place = -group.priority, standing(mine.queue, mine.owner), mine.seq
        return place < (-other.priority, standing(theirs.queue, theirs.owner), theirs.seq)

    # --- the walk, continued ---------------------------------------------------------------------------------

    def _pass(self, queues: list[str]) -> None:
        """One walk. An admission can change who comes first, and so for whom GPUs should have been kept."""
        self._fit = fitting(self.state)
        if self.state.policy.order is Order.FAIR:
            self._admit_claimants()
            self._walk_queues(queues)
            return
        groups = chain.from_iterable(self.state.pending.groups[queue].values() for queue in queues)
        plain = not self._claims and not self.state.books.quota.limited
        line = RankedLine(groups, self._worth, self.state, None if plain else self._before)
        while not self._finished() and self._serve(line):
            pass

    def _admit_claimants(self) -> None:
        """Fair order: who was made room for gets it, or keeps what has come back until the rest has.

        Those who stand before it now may owe that to the very eviction: their owner, or their queue, has less since.
        """
        pending = self.state.pending
        for job_id in sorted(self._claims, key=lambda each: self.state.jobs[each].seq):
            group, job = pending.group_of(job_id), self.state.jobs[job_id]
            if group is None or job_id in self.admitted or not self.open(job.queue):
                continue
            options = self.notes.options.of(job.queue, job.gang)
            if not self._admit_somewhere(job, options, group.shape.bit):
                self._keep_coming(job, options)

    def _start_over(self) -> None:
        """Forget what was kept, but for those whose victims were told already."""
        forgotten = [job_id for job_id in self.kept.reservations if job_id not in self._evicting]
        kept = self.kept.reservations
        self._earlier = {job_id: kept[job_id] for job_id in forgotten if kept[job_id].at > self.now}
        self.kept.forget(forgotten)
        for job_id in forgotten:
            queue, kind, units = self._kept_quota.pop(job_id)
            self._charge(queue, kind, -units)
        self.closed.clear()
        self._patient.clear()
        self._full.clear()
        self._full_in_time.clear()
        self._hopeless.clear()
        self._gangs_served.clear()
        self.first_blocked = None
        self._fit_in_time = 0
        self._kept_coming = 0
        self._coming = None
        self._kept_version += 1

    def _walk_queues(self, queues: list[str]) -> None:
        """Fair order: the queue that is first serves one job, then all queues are compared again."""
        state = self.state
        lines: dict[str, FairLine] = {}
        heap = [(self._queue_key(queue, None), queue) for queue in queues]
        heapq.heapify(heap)
        while heap and not self._finished():
            key, queue = heap[0]
            line = lines.get(queue)
            if line is None:
                mask = self._worth(queue)
                if not state.pending.masks[queue] & mask:
                    heapq.heappop(heap)
                    continue
                line = lines[queue] = FairLine(queue, state.pending.lanes[queue].values(), mask, self._given)
            turn = line.first(self._worth)
            if turn is None:
                heapq.heappop(heap)
                continue
            fresh = self._queue_key(queue, turn.group)
            if fresh > key:
                heapq.heapreplace(heap, (fresh, queue))
                if heap[0][1] != queue:
                    continue
            self._serve(line)
            heapq.heapreplace(heap, (self._queue_key(queue, None), queue))

    def _serve(self, line: Line) -> bool:
        """Deal with the line's turns until one job was admitted or kept for. False at the end of the line."""
        while (turn := line.first(self._worth)) is not None:
            kept = len(self.kept.reservations)
            if self._try(turn) or self.kept.is_coming(turn.job_id):
                line.served()  # the next of its group may ask for others
                return True
            line.drop()
            if len(self.kept.reservations) > kept:
                return True
        return False

    def _finished(self) -> bool:
        """Whether nobody further down could get anything."""
        return self._covered() and not (
            self._fit
            or self._fit_in_time
            or (self._kept_coming < KEPT_COMING and self._transit().may_do())
            or self._searches.may_find()
        )

    def _worth(self, queue: str) -> int:
        """The bits of the shapes whose jobs need to be looked at in this queue."""
        fit = self._fit | self._fit_in_time if self._covered() else EVERY
        mask = (fit and fit & self._within_quota(queue)) | self._searches.mask(queue)
        if self._kept_coming < KEPT_COMING:
            mask |= self._transit().mask(queue)
        return mask

    def _try(self, turn: Turn) -> bool:
        """Steps 3 to 6 for one group's next job. True where it was admitted."""
        group = turn.group
        if turn.job_id in self.admitted:
            return True  # it ended in time for a reservation
        job = self.state.jobs[turn.job_id]
        options = self.notes.options.of(group.queue, group.shape.gang)
        if not options:
            return False
        if not self.feasible(job):
            self._await_boots(job, options)
            return False
        self._serve_gangs_before(job)
        if self._admit_somewhere(job, options, group.shape.bit):
            if len(self.admitted) <= FEW or not len(self.admitted) % FEW:
                self._fit = fitting(self.state, self._fit)
            return True
        if self._in_time(turn, options):
            return True
        same = job.queue, job.owner, job.gang, self._standing(job)
        if same not in self._hopeless:
            self._blocked(job, options)
            if job.id not in self.kept.reservations and self._covered():
                self._hopeless.add(same)
        return False

    def _admit_somewhere(self, job: Job, options: tuple[Option, ...], bit: int) -> bool:
        same = job.queue, job.owner, job.gang
        if same in self._full:
            return False
        admitted, no_place = self._admit_first(job, options)
        if not admitted:
            self._full.add(same)
            if no_place:
                self._fit &= ~bit
        return admitted

    def _admit_first(self, job: Job, options: Sequence[Option]) -> tuple[bool, bool]:
        """Admit the job by the first option that has quota and a place.

        Returns whether it was, and whether nobody else of its shape could be either: it had the quota everywhere, and
        what kept it out is not of its queue.
        """
        no_place = not self.closed and not self.state.policy.queues[job.queue].labels
        for option in options:
            gang = self.within_quota(job, option)
            if gang is None:
                no_place = False
                continue
            places = self.place(gang, option)
            if places is not None:
                self._admit(job, option, places)
                return True, False
        return False, no_place

    def within_quota(self, job: Job, option: Option) -> Gang | None:
        """The gang cut to what the queue and the owner may still take, or None where the minimum is too much."""
        units, least = job.gang.bundle.gpu_units, job.gang.minimum
        left = min(self.state.books.quota.available(job.queue, option.kind), self.owner_left(job))
        if left >= job.gang.gpu_units:
            return job.gang
        count = left // units
        if count < least:
            return None
        return job.gang.at_most(count)

    def owner_left(self, job: Job) -> int:
        """Units that the job's owner may still take in its queue."""
        most = self.state.policy.queues[job.queue].max_gpus_per_owner
        if most is None:
            return UNLIMITED
        held = self.state.books.held_by(job.queue, job.owner)
        return most - held - self._given.units(job.queue, job.owner)

    def place(self, gang: Gang, option: Option) -> tuple[PlacedBundle, ...] | None:
        classes = option.classes
        if self.closed:
            classes = tuple(each for each in classes if id(each) not in self.closed)
            if not classes:
                return None
        return place_elastic(gang, self.state.capacity, classes)

    def _admit(self, job: Job, option: Option, places: tuple[PlacedBundle, ...]) -> None:
        self._overtaken = self._overtaken or self._may_reorder(job.queue)
        self.state.capacity.take(job.gang.bundle, places)
        units = len(places) * job.gang.bundle.gpu_units
        self._charge(job.queue, option.kind, units)
        self._given.give(job.queue, job.owner, units)
        self._loosened |= self.kept.took(job, places)
        if self._coming is not None:
            self._coming.less()
        event = JobAdmitted(self.now, job.id, job.attempts + 1, places, option.gpu_type)
        self.admitted[job.id] = event
        self._events.append(event)

    def _may_reorder(self, queue: str) -> bool:
        """Whether a start in this queue could move somebody for whom something is kept: its place follows from what
        its own queue and those above it have, and from what its owner has there."""
        if self.closed or self._patient:
            return True
        path, jobs = self.state.books.quota.path, self.state.jobs
        above = set(path(queue))
        return any(not above.isdisjoint(path(jobs[job_id].queue)) for job_id in self.kept.reservations)

    def _charge(self, queue: str, kind: str, units: int) -> None:
        self.state.books.quota.add(queue, kind, units)
        self._quota_trial.append((queue, kind, units))

    # --- what blocked jobs do ------------------------------------------------------------------------------

    def _blocked(self, job: Job, options: tuple[Option, ...]) -> None:
        """Step 6: keep for the job what is coming, or what may be taken, or what will be free first."""
        state = self.state
        if self._keep_coming(job, options):
            return
        for option in options if self._may_evict(job) else ():
            eviction = self._searches.evict(job, option, self.kept, self._stopped)
            if eviction is not None:
                self._evicting.add(job.id)
                for victim, cause in eviction.victims:
                    self._stopped[victim] = None
                    self._events.append(StopRequested(self.now, victim, cause, job.id))
                self._coming = None
                self._keep(job, option, eviction.reservation)
                return
        if self.first_blocked is not None and self._covered():
            return
        within = [option for option in options if self.within_quota(job, option) is not None]
        if not within:
            return
        if self.first_blocked is None:
            self.first_blocked = job
        match state.policy.backfill:
            case Backfill.NONE:
                for option in within:
                    for each in option.classes:
                        self.closed.setdefault(id(each), job)
                self._kept_version += 1
            case Backfill.EASY:
                self._reserve(job, within)
            case Backfill.SKIP:
                pass

    def _keep_coming(self, job: Job, options: Sequence[Option]) -> bool:
        """Keep for the job what is on its way back, where that is enough. True where something is kept for it."""
        if job.id in self.kept.reservations:
            return True
        bit = self.state.pending.shapes[job.gang].bit
        may_hold = self.owner_left(job) >= job.gang.least_units
        if not may_hold or not self._transit().may_be_for(job, bit):
            return False
        if self._kept_coming >= KEPT_COMING and not self._may_evict(job):
            return False
        coming = self._transit().reserve(job, options)
        if coming is None:
            return False
        self._kept_coming += 1
        self._keep(job, *coming)
        return True

    def _may_evict(self, job: Job) -> bool:
        """Whether a search for victims might find some for the job."""
        bit = self.state.pending.shapes[job.gang].bit
        return self.owner_left(job) >= job.gang.least_units and bool(bit & self._searches.mask(job.queue))

    def _reserve(self, job: Job, options: Sequence[Option]) -> None:
        """EASY: the earliest date that the job can have on GPU types on which nobody before it has one."""
        others = self._patient | self.kept.covered()
        mine = [option for option in options if not class_ids(option.classes) & others]
        found = self._kept_date(job, mine) or self._earliest(job, mine)
        if found is None:
            return
        option, reservation = found
        patient_until = job.submitted_at + self.state.policy.patience_s
        if reservation.at == inf and self.now < patient_until:
            self._patient |= reservation.classes
            self._kept_version += 1
            self.wake_at(patient_until)
            return
        self._keep(job, option, reservation)
        self._fit = fitting(self.state, self._fit)

    def _serve_gangs_before(self, job: Job) -> None:
        """A node is on its way for the job: first those who wait for several, so that it takes no part of theirs."""
        for gang in self.boots.before(job):
            group = self.state.pending.group_of(gang.id)
            if group is None or gang.id in self.admitted or gang.id in self._gangs_served:
                continue
            self._gangs_served.add(gang.id)
            options = self.notes.options.of(gang.queue, gang.gang)
            if options and not self._admit_somewhere(gang, options, group.shape.bit):
                self._await_boots(gang, options)

    def _await_boots(self, job: Job, options: Sequence[Option]) -> None:
        """Keep its part of the nodes that are up for a job that can start only when others have booted."""
        if self.state.policy.backfill is not Backfill.EASY or job.id in self.kept.reservations:
            return
        if not self.boots.expected(job) or self._covered():
            return
        others = self._patient | self.kept.covered()
        mine = [
            option
            for option in options
            if self.within_quota(job, option) is not None and not class_ids(option.classes) & others
        ]
        found = self._kept_date(job, mine) or self._earliest(job, mine, sooner_than=inf)
        if found is not None and found[1].boots:
            self._keep(job, *found)
            self._fit = fitting(self.state, self._fit)

    def _kept_date(self, job: Job, options: Sequence[Option]) -> tuple[Option, Reservation] | None:
        """The date that the last walk or cycle promised, where it still holds: it does not move without need."""
        earlier = self._earlier.get(job.id)
        old = earlier or self.notes.reservations.get(job.id)
        if old is None or old.evicting:
            return None
        option = next((each for each in options if class_ids(each.classes) == old.classes), None)
        if option is None:
            return None
        if old.boots:
            return self._kept_boots(old, job, option)
        # Where no date is known none is promised: other nodes may have become the better ones, if anything has changed.
        # What was admitted since was chosen with it in mind.
        unmoved = self.notes.gains == self.state.books.gains and not self.admitted and not self._stopped
        if old.at == inf and earlier is None and not (unmoved and not self.kept.reservations):
            return None
        return (option, old) if still_good(old, self.state, job, self.now, self.kept.taken) else None

    def _kept_boots(self, old: Reservation, job: Job, option: Option) -> tuple[Option, Reservation] | None:
        """The same nodes that boot, and the same part of those that are up, as long as no node comes or goes."""
        booting = {each.node_id for each in self.boots.of(job, option)}
        if self.notes.came != _came(self.state) or any(each.node_id not in booting for each in old.boots):
            return None
        return (option, old) if still_good(old, self.state, job, self.now, self.kept.taken) else None

    def _earliest(
        self, job: Job, options: Sequence[Option], sooner_than: float | None = None
    ) -> tuple[Option, Reservation] | None:
        """The earliest date over these GPU types; the first type where dates are equal, or none is known."""
        found: tuple[Option, Reservation] | None = None
        promised = self._promised()
        for option in options:
            boots = self.boots.of(job, option)
            reservation = reserve(
                job,
                self.state,
                option.classes,
                promised,
                self.now,
                self.kept.fresh,
                sooner_than,
                self.kept.taken,
                boots,
            )
            if reservation is not None:
                found, sooner_than = (option, reservation), reservation.at
        return found

    def _keep(self, job: Job, option: Option, reservation: Reservation) -> None:
        """Nobody behind `job` gets what the reservation needs, nor the quota for it."""
        if self.first_blocked is None:
            self.first_blocked = job
        kept = job.queue, option.kind, job.gang.least_units
        self._charge(*kept)
        self._kept_quota[job.id] = kept
        self.kept.keep(reservation)
        self._kept_version += 1
        if self._coming is not None:
            self._coming.kept_for(reservation)
        self._fit_in_time = self._fitting_in_time() if self.kept.holds else 0

    def _promised(self) -> Promised:
        return self.kept.promised(self._stopped)

    def _in_time(self, turn: Turn, options: tuple[Option, ...]) -> bool:
        """Let jobs of the group that end before every reservation is due use what is kept for those.

        True where the group's first job was among them.
        """
        group = turn.group
        if not self._fit_in_time & group.shape.bit:
            return False
        same = group.queue, group.owner, group.shape.gang
        if same in self._full_in_time:
            return False
        before = len(self.admitted)
        candidates = list(self._short_enough(turn, options))
        if not candidates:
            return False
        with self.kept.lifted():
            for job, in_time in candidates:
                admitted, no_place = self._admit_first(job, in_time)
                if not admitted and len(in_time) == len(options):
                    self._full_in_time.add(same)
                    if no_place:
                        self._fit_in_time &= ~group.shape.bit
                    break
        self._loosened |= len(self.admitted) > before
        return turn.job_id in self.admitted

    def _short_enough(self, turn: Turn, options: Sequence[Option]) -> Iterator[tuple[Job, list[Option]]]:
        """The jobs of the group that end before a reservation is due, with the options for which they do."""
        dated = [(due, option) for option in options if (due := self.kept.due(option.classes)) > self.now]
        if not dated:
            return
        jobs = turn.group.jobs
        last = min(len(jobs), turn.index + BACKFILL_DEPTH)
        if last < len(jobs):
            self.bounds.add("backfill_depth")
        for index in range(turn.index, last):
            job = self.state.jobs[jobs[index][1]]
            if job.id in self.admitted or job.id in self.kept.reservations:
                continue
            end = end_if_started(job, self.state, self.now)
            in_time = [option for due, option in dated if end <= due]
            if in_time:
                yield job, in_time

    # --- what counts more than the order ----------------------------------------------------------------------

    def _gone_for(self) -> frozenset[str]:
        """Those for whom others were stopped of whom some, or all, are gone.

        Who stands before them had no right to that. While the last ones are still there what the first have left is
        free, and does not fit whom it is for: it has to be kept before anybody else looks.
        """
        if self.state.policy.order is Order.FIFO:
            return frozenset()  # there an eviction changes nobody's place
        return frozenset(
            each.job_id
            for each in self.notes.reservations.values()
            if each.evicting and each.job_id in self.state.pending and self._some_gone(each)
        )

    def _some_gone(self, reservation: Reservation) -> bool:
        """Whether any of those who were stopped for it holds no GPUs any more."""
        there = {job_id for job_id, attempt in reservation.counted if lives(job_id, attempt, self.state)}
        return not there.issuperset(reservation.evicting)

    def _standing(self, job: Job) -> tuple[int, bool]:
        """What `shortest_first` sets above the rank: what one job can't do, one behind it with another can."""
        if self.state.policy.order is not Order.SHORTEST_FIRST:
            return 0, False
        return job.priority, waited_long(job, self.now, self.state)

    def wake_at(self, at: float) -> None:
        self._wake = at if self._wake is None else min(self._wake, at)

    def unsought(self, job: Job, options: Sequence[Option]) -> bool:
        """Whether this cycle had searched for victims as much as it may before it came to the job."""
        return self._searches.unreached(job, options)

    def kept_units(self, queue: str, kind: str) -> int:
        """Units of the queue's quota that are kept for jobs that come first: the trial counts them as used."""
        return sum(units for *whose, units in self._kept_quota.values() if whose == [queue, kind])

    # --- shortcuts -----------------------------------------------------------------------------------------

    def open(self, queue: str) -> bool:
        """Whether the queue exists and is not stopped."""
        rules = self.state.policy.queues.get(queue)
        return rules is not None and not rules.stopped

    def _covered(self) -> bool:
        """Whether no further reservation can be made: then only what fits need be looked at."""
        version = self._kept_version
        if self._cover is None or self._cover[0] != version:
            self._cover = version, self._is_covered()
        return self._cover[1]

    def _is_covered(self) -> bool:
        classes = self.state.capacity.classes
        match self.state.policy.backfill:
            case Backfill.SKIP:
                return True
            case Backfill.NONE:
                return len(self.closed) >= len(classes)
            case Backfill.EASY:
                covered = self._patient | self.kept.covered()
                return all(
                    id(each) in covered
                    for key, each in classes.items()
                    if key.gpu_slots and each.cordoned < each.size
                )

    def _transit(self) -> Transit:
        if self._coming is None:
            self._coming = Transit(self.state, self.now, self.kept, self._stopped, self.notes.reservations)
        return self._coming

    def _within_quota(self, queue: str) -> int:
        """The bits of the shapes for which the queue has quota left."""
        quota = self.state.books.quota
        if not quota.limited:
            return EVERY
        return self.state.pending.no_larger(quota.most_available(queue))

    def _fitting_in_time(self) -> int:
        """The bits of the shapes that may fit where GPUs are kept, and that some job wants for a short enough time."""
        most_s = self.kept.last_date() - self.now - START_S
        if most_s <= 0:
            return 0
        predicted = self.state.policy.predicted_limits
        short = 0
        for shape in self.state.pending.shapes.values():
            if predicted or (shape.limits_s and shape.limits_s[0] <= most_s):
                short |= shape.bit
        if not short:
            return 0
        with self.kept.passed_over():
            return fitting(self.state, short)

    def _before(self, turn: Turn) -> tuple[float, ...]:
        """What counts more than the order over all queues: whose victims have gone, then who takes its own."""
        quota, group = self.state.books.quota, turn.group
        claims = turn.job_id not in self._claims
        if not quota.limited:
            return (claims,)
        gang = group.shape.gang
        units = gang.least_units
        kinds = {option.kind for option in self.notes.options.of(group.queue, gang)}
        most = min((borrowing(quota.within(group.queue, kind, units)) for kind in kinds), default=inf)
        return claims, most

    def _queue_key(self, queue: str, group: Group | None) -> tuple[object, ...]:
        quota = self.state.books.quota
        within: tuple[bool, ...] = (True,) * len(quota.path(queue))
        if quota.limited:
            if group is not None:
                gang = group.shape.gang
                units = gang.least_units
                kinds = {option.kind for option in self.notes.options.of(queue, gang)}
            else:
                units, kinds = 1, set(quota.every_kind)
            nothing = (False,) * len(within)
            within = max((quota.within(queue, kind, units) for kind in kinds), default=nothing)
        return queue_key(queue, within, self.state)

    def feasible(self, job: Job) -> bool:
        """Whether nodes that are up and not cordoned, were they empty, could hold the job. Remembered."""
        key, version = (job.queue, job.gang), self.state.capacity.shape_version
        known = self.notes.feasible.get(key)
        if known is None or known[0] != version:
            if len(self.notes.feasible) > 10_000:
                self.notes.feasible.clear()
            known = self.notes.feasible[key] = (
                version,
                feasible(self.wanted(job), self.state.open_shapes()),
            )
        return known[1]

    def wanted(self, job: Job) -> Gang:
        """The job's gang with its queue's labels."""
        rules = self.state.policy.queues.get(job.queue)
        return job.gang if rules is None else job.gang.on(rules.labels)


def _came(state: ClusterState) -> tuple[int, int]:
    """Changes when a node comes or goes, or anything is heard of those that boot."""
    return state.capacity.shape_version, state.launches.version


def _stopped_for(state: ClusterState, job_id: str) -> str:
    """The queue of the job for which this one was evicted; "" where it was not, or that job is gone."""
    attempt = state.jobs[job_id].attempt
    claimant = state.jobs.get(attempt.stop_by) if attempt is not None else None
    return claimant.queue if claimant is not None else ""


def _notes(state: ClusterState) -> Notes:
    notes = state.plans.get("cycle")
    if not isinstance(notes, Notes) or notes.class_version != state.capacity.class_version:
        notes = Notes(state)
        state.plans["cycle"] = notes
    return notes
