"""EASY backfill: the first blocked job gets a date and a place, and nobody behind it may move that date.

A reservation names the nodes on which the job will fit at the *shadow time* T, when the running jobs that end
before T by their time limits have ended. A later job may start now if it ends before T by its own limit, or if it
takes nothing on those nodes that the reservation needs at T: no GPUs, no CPUs, no memory. What must stay free for
that is the `hold` of each node; it is subtracted from the node for everybody behind. Jobs without a limit count as
endless: they never use a hold. Where only endless jobs stand in the way T is unknown (infinite), and the hold keeps
what comes back.

A node that boots for the job is one whose boot has all of it until it is there. So a gang of which a part has room on
nodes that are up gets these as soon as the others boot, with a date that follows from how long boots take. Such a date
is an estimate: it may move, and is gone when the boot fails.

Source: Lifka, "The ANL/IBM SP scheduling system", JSSPP '95; Mu'alem and Feitelson, IEEE TPDS 2001.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import chain, islice
from math import inf
from types import MappingProxyType

from rm.core.capacity import Capacity, NodeClass, charged
from rm.core.launches import Boot
from rm.core.model import Attempt, Gang, Job, Node, NodeShape, Phase, PlacedBundle
from rm.core.placement import empty_node
from rm.core.records import replace
from rm.core.relief import Relief
from rm.core.reservations import (
    Promised,
    Reservation,
    Taken,
    class_ids,
    coming,
    has_room,
    lives,
    needs,
)
from rm.core.resources import GPU_UNIT, Amount, Bundle
from rm.core.state import ClusterState

MOST_NODES = 64
"""Nodes up to which it pays to remember by which of them a reservation without a date was chosen."""
MOST_CHOSEN = 64
"""Such reservations that are remembered, for different gangs."""


Fresh = Sequence[tuple[float, Job, Attempt]]
"""(planned end, job, attempt) of what the running cycle has admitted."""
_End = tuple[float, str, Bundle, Attempt]
"""When something ends, whose it is, one of its bundles, the attempt that has them."""


def reserve(
    job: Job,
    state: ClusterState,
    classes: Sequence[NodeClass],
    promised: Promised,
    now: float,
    fresh: Fresh = (),
    sooner_than: float | None = None,
    taken: Mapping[str, Sequence[Taken]] = MappingProxyType({}),
    boots: Sequence[Boot] = (),
) -> Reservation | None:
    """The earliest time and place for `job` by the ends that are known. None where it can never fit.

    `sooner_than`: None too where it fits only at this time or later. `boots`: the nodes that boot for it. They count if
    all else that it needs is there when the last of them is: no node is kept idle beside jobs that run for longer.
    """
    if boots:
        last = max(each.at for each in boots)
        found = _soonest(job, state, classes, promised, now, fresh, sooner_than, taken, last, boots)
        if found is not None:
            return found
    return _soonest(job, state, classes, promised, now, fresh, sooner_than, taken)


def _soonest(
    job: Job,
    state: ClusterState,
    classes: Sequence[NodeClass],
    promised: Promised,
    now: float,
    fresh: Fresh,
    sooner_than: float | None,
    taken: Mapping[str, Sequence[Taken]],
    last: float = inf,
    boots: Sequence[Boot] = (),
) -> Reservation | None:
    """As `reserve`; None too where it fits only after `last`."""
    undated = sooner_than is None and not boots and _nothing_dated(state, promised, fresh)
    if undated:
        same = _chosen(state).get((job.gang, *classes))
        if same is not None and same.stands(job.gang, state.capacity, classes):
            return replace(same.reservation, job_id=job.id)
    with state.capacity.imagined(_occupied(each) for each in boots) as new:
        relief = Relief(job.gang, state.capacity, (*classes, *new), promised.owed)
        gone: dict[tuple[str, int], float] = {}
        looked: list[Node] = []
        dated = _by_end(state, job.id, promised, now, fresh)
        if boots:
            dated = merge(dated, sorted(map(_end_of, boots), key=_when), key=_when)
        for end, whose, bundle, attempt in chain(
            dated, _emptiest_first(state, classes, promised, fresh, looked)
        ):
            if end > last or (sooner_than is not None and end >= sooner_than):
                return None
            gone[whose, attempt.number] = end
            if relief.give(bundle, attempt):
                places = relief.places()
                if places is not None:
                    there = {each.id: mine.number for _, each, mine in fresh}
                    found = _reserved(job, state, end, places, class_ids(classes), gone, there, boots)
                    break
        else:
            return None
    if end == inf:
        found = _without_excess(found, gone, state, job, promised, taken)
    if undated:
        _remember(found, len(looked), relief, job, state, classes)
    return found


def _reserved(
    job: Job,
    state: ClusterState,
    end: float,
    places: Sequence[PlacedBundle],
    classes: frozenset[int],
    gone: Iterable[tuple[str, int]],
    fresh: Mapping[str, int],
    boots: Sequence[Boot],
) -> Reservation:
    """These places, of which those on nodes that are there can be kept from now on."""
    booting = {each.node_id for each in boots}
    need = needs(job.gang.bundle, (each for each in places if each.node_id not in booting))
    there = _on(need, state) | fresh.items()
    counted = frozenset(each for each in gone if each in there)
    late = tuple(each for each in places if each.node_id in booting)
    return Reservation(job.id, end, need, classes, counted, boots=late)


def _all_of(shape: NodeShape) -> Bundle:
    return Bundle(shape.gpu_slots * GPU_UNIT, shape.cpu_milli, shape.memory_bytes)


def _occupied(boot: Boot) -> Node:
    """The node, all of it in its boot's hands."""
    node = replace(empty_node(boot.node_id, boot.shape), returnable=True)
    return charged(node, _all_of(boot.shape), tuple(range(boot.shape.gpu_slots)), +1)


def _end_of(boot: Boot) -> _End:
    """The boot as an attempt that ends when the node is there."""
    places = (PlacedBundle(boot.node_id, tuple(range(boot.shape.gpu_slots))),)
    return boot.at, boot.node_id, _all_of(boot.shape), Attempt(0, places, Phase.RUNNING, boot.at)


def _when(end: _End) -> float:
    return end[0]


def _without_excess(
    found: Reservation,
    gone: Mapping[tuple[str, int], float],
    state: ClusterState,
    job: Job,
    promised: Promised,
    taken: Mapping[str, Sequence[Taken]],
) -> Reservation:
    """The reservation, counting on no more of these ends than it needs, the last ones first.

    What is free and would be enough must be held: else those behind could take it, with nothing but the hope that
    somebody ends whose end nobody knows; and the next cycle would hope for theirs too.
    """
    for each in reversed([each for each, end in gone.items() if end == inf and each in found.counted]):
        less = replace(found, counted=found.counted - {each})
        if has_room(less, state, job, taken, promised.owed):
            found = less
    return found


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A reservation without a date, and all that it was chosen by.

    `first`: the emptiest nodes in order, as far as they were looked at or have room for a bundle as they are, and
    `roomy`, how many have. `others`: where else those run that were looked at. A node's record is another one as soon
    as anything moves there: while these are the same ones the choice would be the same.
    """

    reservation: Reservation
    roomy: int
    first: tuple[Node, ...]
    others: tuple[Node, ...]

    def stands(self, gang: Gang, capacity: Capacity, classes: Sequence[NodeClass]) -> bool:
        """Whether the same would be chosen now."""
        first = islice(_emptiest(capacity, classes), len(self.first))
        return (
            [*map(id, first)] == [*map(id, self.first)]
            and self.roomy == _roomy(gang, classes)
            and all(each.id in capacity and capacity[each.id] is each for each in self.others)
        )


def _chosen(state: ClusterState) -> dict[tuple[object, ...], _Chosen]:
    """What was chosen last without a date, by gang and classes."""
    known = state.plans.setdefault("chosen", {})
    assert isinstance(known, dict)
    return known


def _nothing_dated(state: ClusterState, promised: Promised, fresh: Fresh) -> bool:
    """Whether no end is known and nobody waits for one: then only the nodes decide, which `_Chosen` watches."""
    ends = state.books.ends
    return (
        not (state.books.ending or promised.stopped or promised.owed)
        and (not ends or ends[0][0] == inf)
        and all(end == inf for end, _, _ in fresh)
    )


def _remember(
    found: Reservation,
    looked: int,
    relief: Relief,
    job: Job,
    state: ClusterState,
    classes: Sequence[NodeClass],
) -> None:
    """Note what was chosen for `job` after a look at so many nodes."""
    roomy = _roomy(job.gang, classes)
    most = max(looked, roomy)
    if most > MOST_NODES:
        return
    known = _chosen(state)
    if len(known) >= MOST_CHOSEN:
        known.clear()
    first = tuple(islice(_emptiest(state.capacity, classes), most))
    others = relief.node_ids.difference(each.id for each in first)
    known[job.gang, *classes] = _Chosen(found, roomy, first, tuple(map(state.capacity.__getitem__, others)))


def _roomy(gang: Gang, classes: Sequence[NodeClass]) -> int:
    """How many nodes have room for a bundle, as far as whole GPUs go."""
    gpus = gang.bundle.gpu_units // GPU_UNIT
    return sum(len(nodes) for each in classes for nodes in each.whole[gpus:])


def _on(node_ids: Iterable[str], state: ClusterState) -> set[tuple[str, int]]:
    """The attempts on these nodes."""
    ids = {job_id for node_id in node_ids for job_id in state.books.charged_on.get(node_id, ())}
    return {(job_id, state.jobs[job_id].attempts) for job_id in ids}


def still_good(
    reservation: Reservation,
    state: ClusterState,
    job: Job,
    now: float,
    taken: Mapping[str, Sequence[Taken]] | None = None,
) -> bool:
    """Whether an earlier cycle's reservation still holds its date: its nodes are there, and T is to come."""
    if reservation.at < now:
        return False
    return has_room(reservation, state, job, taken or {}, {})


def still_coming(
    reservation: Reservation,
    state: ClusterState,
    job: Job,
    owed: Mapping[str, Amount],
    stopped: Collection[str],
    taken: Mapping[str, Sequence[Taken]],
) -> bool:
    """Whether an earlier cycle's reservation of what is on its way back will be met where it was made."""
    for job_id, attempt in reservation.counted:
        if lives(job_id, attempt, state) and job_id not in state.books.ending and job_id not in stopped:
            return False
    return has_room(reservation, state, job, taken, owed)


def _by_end(
    state: ClusterState, for_job: str, promised: Promised, now: float, fresh: Fresh
) -> Iterator[_End]:
    for job in coming(state, for_job, promised):
        assert job.attempt is not None
        yield now, job.id, job.gang.bundle, job.attempt
    known = (
        (end, state.jobs[job_id]) for end, _, job_id in state.books.ends if job_id not in promised.stopped
    )
    runs = ((end, job, job.attempt) for end, job in known if job.attempt is not None)
    for end, job, attempt in merge(runs, sorted(fresh, key=lambda each: each[0]), key=lambda each: each[0]):
        if end == inf:
            return
        yield max(end, now), job.id, job.gang.bundle, attempt


def _emptiest(capacity: Capacity, classes: Sequence[NodeClass]) -> Iterator[Node]:
    """The nodes, those with most whole devices free first."""
    most = max((len(each.whole) - 1 for each in classes), default=-1)
    for free in range(most, -1, -1):
        for group in classes:
            if free < len(group.whole):
                for number in group.whole[free]:
                    yield capacity.node_numbered(number)


def _emptiest_first(
    state: ClusterState,
    classes: Sequence[NodeClass],
    promised: Promised,
    fresh: Fresh,
    looked: list[Node],
) -> Iterator[_End]:
    """The endless attempts, node by node: where most is free already, least has to end.

    Nobody knows when they end, and those that run longest are not the ones to end first: they have shown that they
    are long. So what counts is how little must end. `looked`: gets the nodes that it came to.
    """
    given: set[str] = set()
    on_node: dict[str, list[tuple[Job, Attempt]]] = {}
    for end, job, attempt in fresh:
        if end == inf:
            for node_id in {each.node_id for each in attempt.placed}:
                on_node.setdefault(node_id, []).append((job, attempt))
    for node in _emptiest(state.capacity, classes):
        looked.append(node)
        here = list(on_node.get(node.id, ()))
        for job_id in state.books.charged_on.get(node.id, ()):
            job = state.jobs[job_id]
            endless = state.books.planned_end(job) == inf and job_id not in state.books.ending
            if endless and job_id not in promised.stopped and job.attempt is not None:
                here.append((job, job.attempt))
        # In one order, whether this cycle has admitted them or the one before: else the two would disagree.
        for job, attempt in sorted(here, key=lambda each: each[0].seq):
            if job.id not in given:
                given.add(job.id)
                yield inf, job.id, job.gang.bundle, attempt
