"""The ways in which a job may be placed: which GPU types, in which order, under which quota.

An option is a set of node classes whose GPUs count under one kind of quota. A list of acceptable GPU types gives
one option each, in the order of preference. Without a list, each kind that has nodes is an option, so that a gang
never mixes GPUs that are accounted differently.
"""

from __future__ import annotations

from dataclasses import dataclass

from rm.core.capacity import NodeClass
from rm.core.model import Gang
from rm.core.policy import ANY
from rm.core.state import ClusterState


@dataclass(frozen=True, slots=True)
class Option:
    """`kind`: what the quota counts. `classes`: where. `gpu_type`: None where the classes are of several."""

    kind: str
    classes: tuple[NodeClass, ...]
    gpu_type: str | None


class Options:
    """The options of each (queue, gang), remembered until the cluster's shape or the policy changes."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._known: dict[tuple[str, Gang], tuple[Option, ...]] = {}

    def of(self, queue: str, gang: Gang) -> tuple[Option, ...]:
        key = queue, gang
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = tuple(self._find(queue, gang))
        return found

    def _find(self, queue: str, gang: Gang) -> list[Option]:
        state = self._state
        classes = state.capacity.matching(gang.on(state.policy.queues[queue].labels))
        quota = state.books.quota
        if gang.gpu_types:
            ways = [
                (quota.kind(name), tuple(each for each in classes if each.key.gpu_type == name))
                for name in gang.gpu_types
            ]
        else:
            kinds: dict[str, list[NodeClass]] = {}
            for each in classes:
                kinds.setdefault(quota.kind(each.key.gpu_type), []).append(each)
            ways = [
                (kind, tuple(kinds[kind])) for kind in sorted(kinds, key=lambda kind: (kind != ANY, kind))
            ]
        return [Option(kind, found, _one_type(found)) for kind, found in ways if found]


def _one_type(classes: tuple[NodeClass, ...]) -> str | None:
    types = {each.key.gpu_type for each in classes}
    return types.pop() if len(types) == 1 else None
