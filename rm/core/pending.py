"""Jobs that could start now if there were room, grouped by what the scheduler cannot tell apart.

Jobs of one queue, priority, owner and shape (with `shortest_first` of one age too) form a *group*, in the order of
submission: if the first does not fit, none does. The groups of one queue, priority and owner form a *lane*, in the
order of their first jobs, which changes only when jobs come and go. So the work of a cycle grows with the number of
lanes, and of groups in them that could get anything, not of jobs. Jobs that must not start yet (held, waiting for
others, in a pause) are kept apart until an event or the clock lets them in.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Iterator, Mapping

from rm.core.gittins import age_bin
from rm.core.model import Gang, Job
from rm.core.policy import Order, Policy

LIFTS_KEPT = 16
"""Jobs that the clock let in or lifted, of which is told who they were."""
ONE_NAME = 100
"""The distance between two priority names (low, normal, high)."""


class Shape:
    """A gang that some pending job wants. `bit` marks it in masks; `limits_s`: the jobs' time limits, ascending."""

    __slots__ = ("bit", "gang", "jobs", "least_units", "limits_s", "number")

    def __init__(self, gang: Gang, number: int) -> None:
        self.gang = gang
        self.number = number
        self.bit = 1 << number
        self.least_units = gang.least_units
        self.jobs = 0
        self.limits_s: list[float] = []


class Group:
    """Interchangeable jobs. `jobs`: (seq, id) in order."""

    __slots__ = ("age", "jobs", "owner", "priority", "queue", "shape")

    def __init__(self, queue: str, priority: int, owner: str, shape: Shape, age: int) -> None:
        self.queue = queue
        self.priority = priority
        self.owner = owner
        self.shape = shape
        self.age = age
        self.jobs: list[tuple[int, str]] = []


class Lane:
    """The groups of one owner and priority in one queue. `heads`: (seq of the first job, group), in order."""

    __slots__ = ("heads", "mask", "owner", "priority", "queue")

    def __init__(self, queue: str, priority: int, owner: str) -> None:
        self.queue = queue
        self.priority = priority
        self.owner = owner
        self.heads: list[tuple[int, Group]] = []
        self.mask = 0
        """The bits of its shapes."""

    def put(self, group: Group) -> None:
        """A group with a new first job."""
        insort(self.heads, (group.jobs[0][0], group), key=_seq)
        self.mask |= group.shape.bit

    def drop(self, group: Group, seq: int) -> None:
        """The group whose first job was `seq` has no jobs left, or another first job."""
        del self.heads[bisect_left(self.heads, seq, key=_seq)]
        if not any(each.shape is group.shape for _, each in self.heads):
            self.mask &= ~group.shape.bit


def _seq(head: tuple[int, Group]) -> int:
    return head[0]


Key = tuple[str, int, str, int, int]


class Pending:
    """Every queued job: in a group, or aside."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._home: dict[str, Group | None] = {}
        """Job id → its group, or None while it stands aside."""
        self.groups: dict[str, dict[Key, Group]] = {}
        """Queue → its groups."""
        self.lanes: dict[str, dict[tuple[int, str], Lane]] = {}
        """Queue → its lanes, by priority and owner."""
        self.masks: dict[str, int] = {}
        """Queue → the bits of the shapes that it waits for."""
        self._counts: dict[str, dict[int, int]] = {}
        self._by_owner: dict[str, int] = {}
        self.shapes: dict[Gang, Shape] = {}
        self._free_numbers: list[int] = []
        self._by_units: list[tuple[int, int]] | None = None
        """(units of a shape's minimum, the bits of the shapes up to there), ascending. None: shapes have changed."""
        self.lifted = 0
        """How many the clock has let in, or lifted."""
        self._lifts: deque[str] = deque(maxlen=LIFTS_KEPT)
        self._clock: list[tuple[float, str]] = []
        """Moments at which time alone changes where a job stands: the end of a pause, or its age."""

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._home

    def ids(self) -> Iterator[str]:
        return iter(self._home)

    def group_of(self, job_id: str) -> Group | None:
        return self._home.get(job_id)

    def of_owner(self, owner: str) -> int:
        """How many of them are the owner's."""
        return self._by_owner.get(owner, 0)

    def no_larger(self, units: int) -> int:
        """The bits of the shapes whose minimum takes at most so many units."""
        if self._by_units is None:
            mask, steps = 0, []
            for shape in sorted(self.shapes.values(), key=lambda each: each.least_units):
                mask |= shape.bit
                steps.append((shape.least_units, mask))
            self._by_units = steps
        found = bisect_right(self._by_units, units, key=lambda each: each[0])
        return self._by_units[found - 1][1] if found else 0

    def add(self, job: Job, now: float) -> None:
        """Take in a queued job, or one whose record has changed."""
        if job.id in self._home:
            self.remove(job)
        self._home[job.id] = None
        self._by_owner[job.owner] = self._by_owner.get(job.owner, 0) + 1
        if job.held or job.after:
            return
        if job.eligible_at > now:
            heapq.heappush(self._clock, (job.eligible_at, job.id))
            return
        # By rank a job is served again and again: what counts is how long it has waited since.
        since = job.queued_at if self._policy.order is Order.SHORTEST_FIRST else job.submitted_at
        old_at = since + self._policy.max_age_s
        priority = job.priority
        if now >= old_at:
            priority += ONE_NAME
        else:
            heapq.heappush(self._clock, (old_at, job.id))
        self._join(job, priority)

    def remove(self, job: Job) -> None:
        """The job is queued no longer. KeyError where it was not."""
        group = self._home.pop(job.id)
        self._by_owner[job.owner] -= 1
        if not self._by_owner[job.owner]:
            del self._by_owner[job.owner]
        if group is None:
            return
        self._leave(group, (job.seq, job.id))
        shape = group.shape
        shape.jobs -= 1
        if job.time_limit_s is not None:
            del shape.limits_s[bisect_left(shape.limits_s, job.time_limit_s + job.grace_s)]
        if not group.jobs:
            groups = self.groups[group.queue]
            del groups[_key(group)]
            if not groups:
                del self.groups[group.queue]
            counts = self._counts[group.queue]
            counts[shape.number] -= 1
            if not counts[shape.number]:
                del counts[shape.number]
                self.masks[group.queue] &= ~shape.bit
                if not self.masks[group.queue]:
                    del self.masks[group.queue]
        if not shape.jobs:
            del self.shapes[shape.gang]
            self._by_units = None
            self._free_numbers.append(shape.number)

    def _leave(self, group: Group, entry: tuple[int, str]) -> None:
        """Take the job out of its group, and keep the lane in order."""
        index = bisect_left(group.jobs, entry)
        del group.jobs[index]
        if index == 0:
            lanes = self.lanes[group.queue]
            lane = lanes[group.priority, group.owner]
            lane.drop(group, entry[0])
            if group.jobs:
                lane.put(group)
            elif not lane.heads:
                del lanes[group.priority, group.owner]
                if not lanes:
                    del self.lanes[group.queue]

    def advance(self, now: float, jobs: Mapping[str, Job]) -> None:
        """Let in whom the clock lets in, and lift whom it lifts. Called before each cycle. `jobs`: all records."""
        while self._clock and self._clock[0][0] <= now:
            _, job_id = heapq.heappop(self._clock)
            if job_id in self._home:
                self.add(jobs[job_id], now)
                self.lifted += 1
                self._lifts.append(job_id)

    def lifted_since(self, count: int) -> list[str] | None:
        """Whom the clock has let in or lifted since `lifted` was `count`. None where they are too many to tell."""
        new = self.lifted - count
        if new > LIFTS_KEPT:
            return None
        return [job_id for job_id in list(self._lifts)[len(self._lifts) - new :] if job_id in self._home]

    def next_moment(self) -> float | None:
        """When `advance` will next have something to do."""
        while self._clock and self._clock[0][1] not in self._home:
            heapq.heappop(self._clock)
        return self._clock[0][0] if self._clock else None

    def check(self, jobs: Mapping[str, Job]) -> None:
        """Masks, counts and homes, worked out again from the groups. AssertionError where they differ."""
        seen: set[str] = set()
        for queue, groups in self.groups.items():
            mask = 0
            for key, group in groups.items():
                assert key == _key(group), f"group {key} is filed wrongly"
                assert group.jobs, f"group {key} is empty"
                assert group.jobs == sorted(group.jobs), f"group {key} is out of order"
                mask |= group.shape.bit
                for _, job_id in group.jobs:
                    assert self._home[job_id] is group, f"{job_id} is not at home"
                    seen.add(job_id)
            assert self.masks[queue] == mask, f"mask of {queue}"
            heads = sorted((group.jobs[0][0], _key(group)) for group in groups.values())
            lanes = self.lanes[queue]
            assert heads == sorted(
                (seq, _key(group)) for lane in lanes.values() for seq, group in lane.heads
            ), f"lanes of {queue}"
            for (priority, owner), lane in lanes.items():
                mask = 0
                for _, group in lane.heads:
                    assert (group.priority, group.owner) == (priority, owner), f"lane of {_key(group)}"
                    mask |= group.shape.bit
                assert lane.mask == mask, f"mask of a lane of {queue}"
                assert lane.heads == sorted(lane.heads, key=_seq), f"a lane of {queue} is out of order"
        assert self.lanes.keys() == self.groups.keys(), "lanes"
        assert self._by_owner == Counter(jobs[job_id].owner for job_id in self._home), "owners"
        for gang, shape in self.shapes.items():
            limits = [
                job.time_limit_s + job.grace_s
                for job in map(jobs.__getitem__, seen)
                if job.gang == gang and job.time_limit_s is not None
            ]
            assert shape.limits_s == sorted(limits), f"limits of {gang}"
        assert seen == {job_id for job_id, group in self._home.items() if group is not None}, "homes"

    def _join(self, job: Job, priority: int) -> None:
        shape = self.shapes.get(job.gang)
        if shape is None:
            number = self._free_numbers.pop() if self._free_numbers else len(self.shapes)
            shape = self.shapes[job.gang] = Shape(job.gang, number)
            self._by_units = None
        groups = self.groups.setdefault(job.queue, {})
        ranked = self._policy.order is Order.SHORTEST_FIRST
        age = 1 + 2 * age_bin(job.ran_s) + bool(job.evictions) if ranked else 0
        key = (job.queue, priority, job.owner, shape.number, age)
        group = groups.get(key)
        if group is None:
            group = groups[key] = Group(job.queue, priority, job.owner, shape, age)
            counts = self._counts.setdefault(job.queue, {})
            counts[shape.number] = counts.get(shape.number, 0) + 1
            self.masks[job.queue] = self.masks.get(job.queue, 0) | shape.bit
        self._line_up(group, (job.seq, job.id))
        shape.jobs += 1
        if job.time_limit_s is not None:
            insort(shape.limits_s, job.time_limit_s + job.grace_s)
        self._home[job.id] = group

    def _line_up(self, group: Group, entry: tuple[int, str]) -> None:
        """Put the job into its group, and keep the lane in order."""
        if not group.jobs or entry < group.jobs[0]:
            lanes = self.lanes.setdefault(group.queue, {})
            lane = lanes.get((group.priority, group.owner))
            if lane is None:
                lane = lanes[group.priority, group.owner] = Lane(group.queue, group.priority, group.owner)
            if group.jobs:
                lane.drop(group, group.jobs[0][0])
            insort(group.jobs, entry)
            lane.put(group)
        else:
            insort(group.jobs, entry)


def _key(group: Group) -> Key:
    return group.queue, group.priority, group.owner, group.shape.number, group.age
