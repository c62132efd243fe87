"""What an autoscaler could launch, what it is launching, what failed; and what is wanted of it.

A node type may have `NodeShape.most` nodes at a time. Of these some are up and some are booting, as the runtime
observes; the rest can be launched, unless the type is in a pause: its last launch failed, or no node of it joined for
longer than the policy's `boot_timeout_s` although one was wanted, or one joined with fewer GPUs than the type declares.
A pause doubles with each failure in a row and ends with the first whole node of the type that joins. Until then jobs
are given their next acceptable type (`scaleup`).

All of it is a cache of what can be observed again: after a restart nothing is in a pause, and what is wanted is worked
out anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from rm.core.model import NodeShape
from rm.core.policy import Policy
from rm.core.records import replace

MOST_NODES = 100
"""Nodes that are wanted at a time, and of one type those that boot with which is planned. More are wanted when these
have come."""
PAUSE_S = 60.0
"""After a type's first failure; doubled with each one in a row, up to the next bound."""
PAUSE_MOST_S = 1_800.0
SOON_S = 1.0
"""How soon a node may be there that has booted for longer than its like: nobody may count on more."""
BOOTS_KEPT = 20
"""Boots of a type from which the next one's duration is estimated."""


@dataclass(frozen=True, slots=True)
class Want:
    """What one waiting job needs beyond the nodes that are up. `node_types`: one entry for each node, shared or not."""

    job_id: str
    node_types: tuple[str, ...]
    gpu_type: str | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """Nodes that are of use only together, and for whom.

    `node_types`: an entry for each new node. `kept`: GPU units on nodes that are up and free, which the same jobs need
    besides: without them the new nodes would be of no use, so they must not go away meanwhile.
    """

    node_types: tuple[str, ...]
    jobs: tuple[str, ...]
    kept: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Everything that is wanted at one moment. It replaces what was wanted before.

    `stay`: nodes that are up and idle and must not go away for it, since they are kept for somebody.
    """

    asks: tuple[Ask, ...] = ()
    wants: Mapping[str, Want] = field(default_factory=dict)
    stay: tuple[str, ...] = ()

    def nodes(self) -> dict[str, int]:
        """By type, how many nodes: those that boot already are among them."""
        counts: dict[str, int] = {}
        for ask in self.asks:
            for name in ask.node_types:
                counts[name] = counts.get(name, 0) + 1
        return counts


NOTHING_WANTED = Wanted()


@dataclass(frozen=True, slots=True)
class LaunchFailure:
    """The last failure of a node type. `until`: nothing is asked of the type before then."""

    at: float
    message: str
    in_a_row: int
    until: float


@dataclass(frozen=True, slots=True)
class Coming:
    """A node that is not there yet. `since`: when it was asked for, or first seen to boot.

    `jobs`: those who wait for it, by what is wanted; nobody where it comes anyway.
    """

    shape: NodeShape
    since: float
    booting: bool
    jobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Boot:
    """A node that boots, as whoever plans with it names it, and when it will be there."""

    node_id: str
    shape: NodeShape
    at: float


def boot_id(name: str, number: int) -> str:
    """What the node of this type that boots, the oldest first, is called until it is there."""
    return f"booting/{name}/{number}"


class Launches:
    """The node types and their launches. `ClusterState` changes it by events; `scaleup` says what is wanted."""

    def __init__(self) -> None:
        self.types: dict[str, NodeShape] = {}
        self.awaited = False
        """Whether an autoscaler may run whose node types are not known yet."""
        self.returnable: frozenset[str] = frozenset()
        """The nodes that the autoscaler takes away again when they are idle."""
        self.up: Mapping[str, int] = {}
        self.booting: Mapping[str, int] = {}
        self.most_in_all: int | None = None
        """Of all types together, or None where only the types have bounds."""
        self.failures: dict[str, LaunchFailure] = {}
        self.wanted = NOTHING_WANTED
        self.version = 0
        """Grows with every change that can change what is wanted."""
        self._before: Mapping[str, Want] = {}
        self._wanted_at = 0.0
        """When `wanted` was last worked out; `_before` is what was wanted before that moment."""
        self._asked: dict[str, float] = {}
        """Since when a node of the type has been wanted without one joining."""
        self._boots: dict[str, list[float]] = {}
        self._booting_since: dict[str, tuple[float, ...]] = {}
        """By type, since when each node that boots has been asked for or seen to boot, the oldest first."""
        self.short: tuple[tuple[str, int, int], ...] = ()
        """The types of which nodes are up with fewer GPUs than declared: how many, and the fewest GPUs of one."""
        self._came_short: dict[str, int] = {}
        """By type, the GPUs of a node that came so and that nobody has told of yet."""

    # --- reading -------------------------------------------------------------------------------------------

    def shapes(self) -> tuple[NodeShape, ...]:
        """What could be up beyond the nodes that are, whatever has failed lately."""
        left = ((shape, shape.most - self.up.get(name, 0)) for name, shape in self.types.items())
        return tuple(replace(shape, most=most) for shape, most in left if most > 0)

    def coming(self, now: float) -> Iterator[tuple[NodeShape, int]]:
        """The types of which nodes boot, and how many."""
        for name, count in self.booting.items():
            if count and name in self.types and not self.paused(name, now):
                yield self.types[name], count

    def left(self, now: float) -> Iterator[tuple[NodeShape, int]]:
        """The types of which nodes can be launched, and how many more."""
        room = None
        if self.most_in_all is not None:
            room = self.most_in_all - sum(self.up.values()) - sum(self.booting.values())
        for name, shape in self.types.items():
            count = shape.most - self.up.get(name, 0) - self.booting.get(name, 0)
            count = count if room is None else min(count, room)
            if count > 0 and shape.gpu_slots and not self.paused(name, now):
                yield shape, count

    def paused(self, name: str, now: float) -> bool:
        failure = self.failures.get(name)
        return failure is not None and now < failure.until

    def boot_s(self, name: str, policy: Policy) -> float:
        """How long a node of the type takes to join: the median of the last ones, else the policy's guess."""
        known = self._boots.get(name)
        return sorted(known)[len(known) // 2] if known else policy.boot_s

    def joins_at(self, coming: Coming, policy: Policy, now: float, *, median: bool) -> float:
        """When the node will be there: by the median of what boots of its type take, or by the longest of ten.

        It takes no less than it has taken already. Who takes longer than any boot before has until it counts as failed;
        so it is with the longest where no boot of the type has been seen.
        """
        known = self._boots.get(coming.shape.name) or ([policy.boot_s] if median else [])
        left = sorted(each for each in known if coming.since + each > now)
        if not left:
            return max(now, coming.since + policy.boot_timeout_s)
        return coming.since + left[len(left) // 2 if median else len(left) * 9 // 10]

    def boots(self, policy: Policy, now: float) -> Iterator[Boot]:
        """The nodes that boot, but for types in a pause. Until a boot has failed its node may be there soon."""
        for shape, count in self.coming(now):
            boot_s = self.boot_s(shape.name, policy)
            for number, since in enumerate(self._booting_since[shape.name][: min(count, MOST_NODES)]):
                yield Boot(boot_id(shape.name, number), shape, max(since + boot_s, now + SOON_S))

    def wanted_before(self, now: float) -> Mapping[str, Want]:
        """What was wanted before this moment, by job.

        What this very moment brings is left out, or a second decision at the same moment would be another one.
        """
        return self._before if now <= self._wanted_at else self.wanted.wants

    def on_their_way(self, now: float) -> list[Coming]:
        """The nodes that boot or are asked for, but for types in a pause; those that are wanted first come first."""
        for_whom: dict[str, list[tuple[str, ...]]] = {}
        for ask in self.wanted.asks:
            for name in ask.node_types:
                jobs = tuple(each for each in ask.jobs if name in self.wanted.wants[each].node_types)
                for_whom.setdefault(name, []).append(jobs)
        found = []
        for name, shape in self.types.items():
            booting, wanted = self._booting_since.get(name, ()), for_whom.get(name, [])
            if self.paused(name, now):
                continue
            for number in range(max(len(booting), len(wanted))):
                boots = number < len(booting)
                since = booting[number] if boots else self._asked.get(name, now)
                jobs = wanted[number] if number < len(wanted) else ()
                found.append(Coming(shape, since, boots, jobs))
        return found

    def failing(self, policy: Policy, now: float) -> Iterator[tuple[str, str]]:
        """The types that have let those who wait for them down, and in which words.

        No node of them joined for too long, or one that is smaller than they declare.
        """
        for name, gpus in self._came_short.items():
            yield (
                name,
                f"a node of it came with {gpus} GPUs, and the type declares {self.types[name].gpu_slots}",
            )
        for name, since in self._asked.items():
            if since + policy.boot_timeout_s <= now and not self.paused(name, now):
                booting = self.booting.get(name, 0)
                what = f"{booting} booting" if booting else "none booting"
                yield name, f"no node joined within {policy.boot_timeout_s:g} s, {what}"

    def next_moment(self, policy: Policy, now: float) -> float | None:
        """When time alone will change something next."""
        ends = [each.until for name, each in self.failures.items() if name in self.types]
        due = [since + policy.boot_timeout_s for since in self._asked.values()]
        return min((moment for moment in (*ends, *due) if moment > now), default=None)

    # --- changing ------------------------------------------------------------------------------------------

    def observe_types(
        self, shapes: Iterable[NodeShape], most_in_all: int | None, *, awaited: bool = False
    ) -> None:
        self.awaited = awaited
        self.types = {shape.name or f"type {number}": shape for number, shape in enumerate(shapes, 1)}
        self.types = {name: replace(shape, name=name) for name, shape in self.types.items()}
        self._came_short = {name: gpus for name, gpus in self._came_short.items() if name in self.types}
        self.most_in_all = most_in_all
        self.version += 1

    def observe(
        self,
        up: Mapping[str, int],
        booting: Mapping[str, int],
        now: float,
        *,
        short: tuple[tuple[str, int, int], ...] = (),
        returnable: Collection[str] = (),
    ) -> None:
        """What is there of each type. A node that joined ends the type's pause, and tells how long a boot takes.

        Not so one with fewer GPUs than its type declares: whoever needs a whole one would ask for the next for ever.
        """
        before = {name: count for name, count, _ in self.short}
        came_short = {name: gpus for name, count, gpus in short if count > before.get(name, 0)}
        for name in up:
            if up[name] > self.up.get(name, 0):
                # Whoever waited for it may have it by now, and nothing is asked for any longer.
                asked = self._asked.pop(name, None)
                began = self._booting_since.get(name) or (() if asked is None else (asked,))
                boots = [now - since for since in began[: up[name] - self.up.get(name, 0)]]
                self._boots[name] = [*self._boots.get(name, ()), *boots][-BOOTS_KEPT:]
                if name in came_short and name in self.types:
                    self._came_short[name] = came_short[name]
                else:
                    self.failures.pop(name, None)
        self.short, self.returnable = short, frozenset(returnable)
        self._booting_since = {
            name: _as_many(self._booting_since.get(name), count, now, self._asked.get(name, now))
            for name, count in booting.items()
            if count
        }
        self.up, self.booting = dict(up), dict(booting)
        self.version += 1

    def fail(self, name: str, message: str, now: float) -> None:
        """A launch of the type failed, or took too long, or brought less than the type declares."""
        before = self.failures.get(name)
        in_a_row = 1 if before is None else before.in_a_row + (now >= before.until)
        pause_s = min(PAUSE_MOST_S, PAUSE_S * 2 ** (in_a_row - 1))
        self.failures[name] = LaunchFailure(now, message, in_a_row, now + pause_s)
        self._asked.pop(name, None)
        self._came_short.pop(name, None)
        self.version += 1

    def want(self, wanted: Wanted, now: float) -> None:
        """What is wanted from now on."""
        if now > self._wanted_at:
            self._before, self._wanted_at = self.wanted.wants, now
        self.wanted = wanted
        counts = wanted.nodes()
        self._asked = {name: self._asked.get(name, now) for name in counts}


def _as_many(before: tuple[float, ...] | None, count: int, now: float, asked: float) -> tuple[float, ...]:
    """The moments of so many nodes. The first began when they were asked for, more begin now; the oldest come first."""
    if before is None:
        return (asked,) * count
    return before[max(0, len(before) - count) :] + (now,) * (count - len(before))
