"""Which nodes are wanted that are not there: what the scheduler would do if all that can be launched were up.

    decide(state, now):
      1. the cycle, as ever (`cycle`)
      2. a trial cluster: what the cycle left free, the nodes that boot, and as many empty ones as could be launched
      3. those for whom the cycle keeps GPUs: who waits for nodes that boot goes on asking for them; who would get new
         nodes sooner than what is kept asks for these, beside what is kept
      4. a walk in order over everybody else who waits, under the same quotas; each job takes what is free, then room
         on nodes that boot or that others before it want, then the node type with the least waste
      5. the same jobs once more, the largest first: if that takes fewer nodes, so be it
      6. nodes that are of use only together become one `Ask`
      7. what is kept on idle nodes keeps these from going away

Whoever starts now, or gets what is coming back, asks for nothing. What is wanted replaces what was wanted before and
is worked out anew whenever something has changed, so it is withdrawn when a job is outranked, starts or is cancelled,
and nothing has to be remembered over a restart.

It costs nothing where nothing can be launched. Else it is bounded: at most MOST_NODES nodes are wanted at a time, so at
most as many jobs are looked at as fit on them; and after a costly look the next one has to wait for a moment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rm.core.capacity import Capacity, NodeClass, usable
from rm.core.cycle import Cycle, Plan
from rm.core.events import GangCut, JobAdmitted
from rm.core.launches import MOST_NODES, NOTHING_WANTED, Ask, Want, Wanted, boot_id
from rm.core.model import Gang, Job, Node, NodeShape, PlacedBundle
from rm.core.options import Option
from rm.core.placement import empty_node, place_elastic
from rm.core.records import replace
from rm.core.reservations import Reservation
from rm.core.resources import GPU_UNIT, NOTHING, Amount
from rm.core.shapes import recut
from rm.core.state import ClusterState

MOST_FREE = 2_000
"""Nodes with something free that the trial looks at."""
CHEAP = 500
"""Nodes and jobs up to which a look costs nearly nothing, and is taken whenever something has changed."""
PAUSE_S = 0.001
"""For each node and job beyond: so long no further look is taken."""
_NOBODY = JobAdmitted(0.0, "", 0, ())
_NEW = "rm/new"
"""The label by which the trial tells its own nodes from those that are up; its value is the node type."""


def decide(state: ClusterState, now: float) -> Plan:
    """As `cycle.schedule`. Besides, `state.launches.wanted` says afterwards what is to be asked of an autoscaler."""
    with Cycle(state, now) as cycle:
        cycle.walk()
        _look(cycle)
        return cycle.plan()


def cuts(state: ClusterState, now: float) -> list[GangCut]:
    """The bundles of jobs that came before the node types were known, now that they are. Called before `decide`."""
    if not state.uncut or state.launches.awaited:
        return []
    shapes = state.node_shapes()
    return [GangCut(now, job_id, recut(state.jobs[job_id].gang, shapes)) for job_id in state.uncut]


@dataclass(frozen=True, slots=True)
class _Looked:
    """When the last look was taken, and at what."""

    key: tuple[int, int, int]
    again_at: float


def _look(cycle: Cycle) -> None:
    """Step 2 and on, where anything has changed since the last look."""
    state, now = cycle.state, cycle.now
    launches = state.launches
    if not launches.types:
        return
    coming, left = list(launches.coming(now)), list(launches.left(now))
    stay = _staying(cycle)
    if not (coming or left) or not state.pending.shapes:
        launches.want(Wanted(stay=stay) if stay else NOTHING_WANTED, now)
        return
    key = state.version, launches.version, len(cycle.admitted)
    looked = state.plans.get("scaleup")
    if isinstance(looked, _Looked) and now < looked.again_at:
        if looked.key != key:
            cycle.wake_at(looked.again_at)
            launches.want(_still(launches.wanted, cycle, stay), now)
        return
    trial = _Trial(cycle, coming, left)
    launches.want(trial.wanted(stay), now)
    cost = max(0, trial.cost - CHEAP)
    state.plans["scaleup"] = _Looked(key, now + PAUSE_S * cost)


def _staying(cycle: Cycle) -> tuple[str, ...]:
    """Step 7. Where jobs run, or start now, nothing has to be done. On nodes that leave already nothing is kept."""
    state, kept = cycle.state, cycle.kept
    idle = [node_id for node_id in kept.holds if node_id in state.idle_since and node_id not in kept.taken]
    return tuple(node_id for node_id in sorted(idle) if state.nodes[node_id].returnable)


def _still(wanted: Wanted, cycle: Cycle, stay: tuple[str, ...]) -> Wanted:
    """What was wanted, without those who start or have gone."""
    pending, admitted = cycle.state.pending, cycle.admitted
    gone = {each for each in wanted.wants if each not in pending or each in admitted}
    if not gone:
        return wanted if wanted.stay == stay else replace(wanted, stay=stay)
    asks = []
    for ask in wanted.asks:
        jobs = tuple(each for each in ask.jobs if each not in gone)
        if jobs:
            asks.append(replace(ask, jobs=jobs))
    return Wanted(tuple(asks), {name: want for name, want in wanted.wants.items() if name not in gone}, stay)


class _Trial:
    """One look."""

    def __init__(
        self, cycle: Cycle, coming: Sequence[tuple[NodeShape, int]], left: Sequence[tuple[NodeShape, int]]
    ) -> None:
        self._cycle = cycle
        self._capacity = Capacity()
        self._prices = cycle.state.policy.prices
        most = _bundles_waiting(cycle.state)
        for node in self._free_nodes():
            self._capacity.join(node)
        for shape, count in coming:
            self._add(shape, "booting", min(count, MOST_NODES))
        for shape, count in left:
            self._add(shape, "launched", min(count, most, MOST_NODES))
        self.cost = len(self._capacity)

    def _free_nodes(self) -> Iterator[Node]:
        """The nodes that are up and have something free, after what the cycle gave away and keeps."""
        real, looks = self._cycle.state.capacity, 0
        held = {node_id for each in self._cycle.kept.reservations.values() for node_id in each.need}
        for node_id in sorted(held):
            if node_id in real:
                yield real[node_id]
        for group in real.classes.values():
            numbers = [number for bucket in group.whole[:0:-1] for number in bucket]
            numbers += sorted(
                {number for bucket in group.partial.values() for number in bucket} - set(numbers)
            )
            for number in numbers:
                node = real.node_numbered(number)
                if node.id not in held and looks < MOST_FREE:
                    looks += 1
                    yield node

    def _add(self, shape: NodeShape, how: str, count: int) -> None:
        labels = tuple(sorted({**dict(shape.labels), _NEW: f"{how} {shape.name}"}.items()))
        for number in range(count):
            node_id = boot_id(shape.name, number) if how == "booting" else f"{how}/{shape.name}/{number}"
            node = empty_node(node_id, shape)
            self._capacity.join(replace(node, name=shape.name, labels=labels))

    def wanted(self, stay: tuple[str, ...]) -> Wanted:
        cycle, state = self._cycle, self._cycle.state
        twin = copy.copy(state)
        twin.capacity, twin.plans = self._capacity, {}
        with _WhatIf(twin, cycle) as walk:
            walk.serve_reserved()
            walk.walk()
            self.cost += len(walk.placed)
            placed = [*walk.settled, *self._fewest(walk)]
            return self._as_wanted(placed, stay)

    def _fewest(self, walk: _WhatIf) -> list[_Placed]:
        """The jobs' places, packed anew with the largest first where that takes fewer nodes."""
        placed = walk.placed
        ordered = sorted(placed, key=lambda each: (-each.job.gang.bundle.gpu_units, each.job.seq))
        before = _new_nodes(placed)
        if len(placed) < 2 or len(before) < 2:
            return placed
        for each in placed:
            self._capacity.give(each.job.gang.bundle, each.places)
        again: list[_Placed] = []
        for each in ordered:
            gang = each.job.gang.sized(len(each.places))
            places = walk.place(gang, each.option)
            if places is None or len(places) < gang.count:
                return placed
            self._capacity.take(gang.bundle, places)
            again.append(_Placed(each.job, each.option, places))
        after = _new_nodes(again)
        return again if (len(after), walk.price(after)) < (len(before), walk.price(before)) else placed

    def _as_wanted(self, placed: Iterable[_Placed], stay: tuple[str, ...]) -> Wanted:
        """Step 6: jobs that share a node, or nodes that share a job, belong together."""
        wants: dict[str, Want] = {}
        asks: list[Ask] = []
        for together in _components(each for each in placed if _new_nodes([each])):
            new = sorted(_new_nodes(together))
            kept: dict[str, int] = {}
            for each in together:
                for place in each.places:
                    if not _is_new(place.node_id):
                        units = kept.get(place.node_id, 0) + each.job.gang.bundle.gpu_units
                        kept[place.node_id] = units
                mine = sorted(_new_nodes([each]))
                types = tuple(self._capacity[node_id].name for node_id in mine)
                wants[each.job.id] = Want(each.job.id, types, self._capacity[mine[0]].gpu_type)
            types = tuple(sorted(self._capacity[node_id].name for node_id in new))
            jobs = tuple(each.job.id for each in sorted(together, key=lambda each: each.job.seq))
            asks.append(Ask(types, jobs, tuple(sorted(kept.items()))))
        return Wanted(tuple(asks), wants, stay)


@dataclass(frozen=True, slots=True)
class _Placed:
    job: Job
    option: Option
    places: tuple[PlacedBundle, ...]


class _WhatIf(Cycle):
    """The walk of a cycle on the trial's nodes: nobody is evicted, nothing is kept, nothing is waited for."""

    def __init__(self, twin: ClusterState, real: Cycle) -> None:
        super().__init__(twin, real.now, for_readers=True)
        self.placed: list[_Placed] = []
        self.settled: list[_Placed] = []
        """Those whose nodes boot already: they get these and no others."""
        self._real = real
        self._opened: set[str] = set()
        self.admitted = dict(real.admitted)
        for job_id, event in real.admitted.items():
            job = twin.jobs[job_id]
            self._given.give(job.queue, job.owner, len(event.placed) * job.gang.bundle.gpu_units)

    def serve_reserved(self) -> None:
        """Step 3. What is kept for them was kept with their quota."""
        kept = self._real.kept
        for job_id, reservation in kept.reservations.items():
            job = self.state.jobs[job_id]
            if reservation.boots:
                self._go_on(job, reservation)
            elif reservation.at > self.now and not reservation.evicting:
                self._serve_reserved(job, reservation.at)
            # Nothing is asked for it a second time, and nothing of what is coming back for it.
            self.admitted.setdefault(job_id, _NOBODY)

    def _go_on(self, job: Job, reservation: Reservation) -> None:
        """The nodes that it waits for, and what is kept for it beside them. The date is that of the boots: no reason
        to do without these."""
        capacity, bundle = self.state.capacity, job.gang.bundle
        capacity.take(bundle, reservation.boots)
        places = list(reservation.boots)
        for node_id, need in reservation.need.items():
            held = self._real.kept.holds.get(node_id, NOTHING).at_most(need)
            places += [PlacedBundle(node_id, ())] * (held.gpu_units // bundle.gpu_units)
        new_class = capacity.class_of(reservation.boots[0].node_id)
        options = self.notes.options.of(job.queue, job.gang)
        option = next(each for each in options if new_class in each.classes)
        self.settled.append(_Placed(job, option, tuple(places)))
        self._opened |= {each.node_id for each in reservation.boots}

    def _serve_reserved(self, job: Job, due: float) -> None:
        kept, capacity = self._real.kept, self.state.capacity
        launches, policy = self.state.launches, self.state.policy
        held = {
            node_id: kept.holds.get(node_id, NOTHING).at_most(need)
            for node_id, need in kept.reservations[job.id].need.items()
            if node_id in capacity
        }
        for node_id, amount in held.items():
            capacity.keep_free(node_id, -amount)
        for option in self.notes.options.of(job.queue, job.gang):
            places = self.place(job.gang, option)
            new = {each.node_id for each in places or () if _is_new(each.node_id)}
            if places is None or not new:
                continue
            if self.now + max(launches.boot_s(capacity[node_id].name, policy) for node_id in new) < due:
                self._put(job, option, places)
                break
            places = None
        else:
            places = None
        # Those behind get nothing of what is kept for it, wherever it goes in the end.
        for node_id, amount in held.items():
            there = sum(each.node_id == node_id for each in places or ())
            capacity.keep_free(node_id, amount.beyond(Amount.of(job.gang.bundle, there)))

    def _put(self, job: Job, option: Option, places: tuple[PlacedBundle, ...]) -> None:
        self.state.capacity.take(job.gang.bundle, places)
        self._note(job, option, places)

    def _note(self, job: Job, option: Option, places: tuple[PlacedBundle, ...]) -> None:
        self.placed.append(_Placed(job, option, places))
        self._opened |= {each.node_id for each in places if _is_new(each.node_id)}

    # --- the walk --------------------------------------------------------------------------------------------

    def feasible(self, job: Job) -> bool:  # noqa: ARG002
        return True  # a look at the places says it as well

    def _serve_gangs_before(self, job: Job) -> None:
        """Here everybody is served in order: what boots is there for him too."""

    def _nothing_new(self) -> bool:
        return False

    def _finished(self) -> bool:
        return not self._fit or len(self._opened) > MOST_NODES

    def _worth(self, queue: str) -> int:
        return self._fit and self._fit & self._within_quota(queue)

    def _blocked(self, job: Job, options: tuple[Option, ...]) -> None:
        """Nobody is blocked by what could not be launched either."""

    def _admit(self, job: Job, option: Option, places: tuple[PlacedBundle, ...]) -> None:
        super()._admit(job, option, places)
        self._note(job, option, places)

    # --- step 4: where ---------------------------------------------------------------------------------------

    def place(self, gang: Gang, option: Option) -> tuple[PlacedBundle, ...] | None:
        """What is up, then what boots, then one more type: that with the least waste, then the cheapest."""
        capacity = self.state.capacity
        up = [each for each in option.classes if _made(each) is None]
        booting = [each for each in option.classes if (_made(each) or "").startswith("booting ")]
        launched = [each for each in option.classes if (_made(each) or "").startswith("launched ")]
        for classes in ([up] if up else []) + ([[*up, *booting]] if booting else []):
            places = place_elastic(gang, capacity, classes)
            if places is not None and len(places) == gang.count:
                return places
        best: tuple[tuple[float, ...], tuple[PlacedBundle, ...]] | None = None
        ways: list[list[NodeClass]] = [[*up, *booting, each] for each in launched]
        if len(launched) > 1:
            ways.append([*up, *booting, *launched])
        ways.append([*up, *booting])
        for number, classes in enumerate(ways):
            places = place_elastic(gang, capacity, classes)
            if places is None:
                continue
            new = {each.node_id for each in places if each.node_id.startswith("launched/")}
            fresh = {node_id for node_id in new if _untouched(capacity[node_id])}
            slots = sum(capacity[node_id].gpu_slots for node_id in fresh) * GPU_UNIT
            used = sum(gang.bundle.gpu_units for each in places if each.node_id in fresh)
            cost = (-len(places), slots - used, self.price(fresh), len(fresh), number)
            if best is None or cost < best[0]:
                best = cost, places
        return None if best is None else best[1]

    def price(self, nodes: Iterable[str]) -> float:
        """Of these new nodes, in an hour. Types without a price cost nothing."""
        prices, capacity = self.state.policy.prices, self.state.capacity
        return sum(prices.get(capacity[node_id].name, 0.0) for node_id in nodes)


def _made(group: NodeClass) -> str | None:
    """How the trial made the nodes of the class, and their type; None where they are up."""
    return next((value for key, value in group.key.labels if key == _NEW), None)


def _is_new(node_id: str) -> bool:
    return "/" in node_id


def _untouched(node: Node) -> bool:
    return usable(node).total_free == node.gpu_slots * GPU_UNIT


def _new_nodes(placed: Iterable[_Placed]) -> set[str]:
    return {place.node_id for each in placed for place in each.places if _is_new(place.node_id)}


def _components(placed: Iterable[_Placed]) -> list[list[_Placed]]:
    """The jobs that share new nodes, directly or through others, in the order of their first jobs."""
    of_node: dict[str, list[_Placed]] = {}
    for each in sorted(placed, key=lambda each: each.job.seq):
        mine = [each]
        for node_id in _new_nodes([each]):
            other = of_node.get(node_id)
            if other is not None and other is not mine:
                mine += [one for one in other if one not in mine]
        for node_id in _new_nodes(mine):
            of_node[node_id] = mine
    found: list[list[_Placed]] = []
    for group in of_node.values():
        if all(group is not each for each in found):
            found.append(group)
    return sorted(found, key=lambda group: min(each.job.seq for each in group))


def _bundles_waiting(state: ClusterState) -> int:
    """Of all jobs that wait: no more nodes than that could be of use."""
    return sum(shape.jobs * shape.gang.count for shape in state.pending.shapes.values())
