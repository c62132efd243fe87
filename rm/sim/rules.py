"""The rules of a replay: the presets that `--policy` knows, a trace's queues, and `--set`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from enum import StrEnum
from math import inf
from typing import Any

from rm.core.policy import ANY, Backfill, Order, Policy, Preempt, QueuePolicy, Reclaim
from rm.core.resources import gpu_units
from rm.errors import InvalidSpec
from rm.sim.cluster import SHARED, SimCluster
from rm.sim.trace import TraceJob

DEFAULT = Policy(queues={})
STRICT_FIFO = Policy(queues={}, order=Order.FIFO, backfill=Backfill.NONE, max_age_s=inf)
KUEUE = Policy(queues={}, order=Order.FIFO, backfill=Backfill.SKIP, max_age_s=inf)
SLURM = Policy(queues={}, order=Order.FIFO, backfill=Backfill.EASY, predicted_limits=True, max_age_s=inf)
PATIENT = Policy(queues={}, patience_s=6 * 3600.0)
SHORTEST = Policy(queues={}, order=Order.SHORTEST_FIRST, backfill=Backfill.SKIP, max_age_s=12 * 3600.0)
"""`queues={}`: the queues of the trace, each without a quota. Where the order is by submission age lifts nobody:
the oldest is first anyway. By rank nothing is reserved: who has waited for 12 hours comes first."""

_AMOUNTS = {"nominal", "borrow_limit", "lend_limit"}
_ENUMS: dict[str, type[StrEnum]] = {
    "order": Order,
    "backfill": Backfill,
    "preempt": Preempt,
    "reclaim": Reclaim,
}
_OF_POLICY = {
    "order",
    "backfill",
    "half_life_s",
    "max_age_s",
    "predicted_limits",
    "min_runtime_s",
    "patience_s",
    "settle_s",
    "default_queue",
}
_OF_QUEUE = {each.name for each in fields(QueuePolicy)} - {"name", "labels", "parent"}
_WORDS = {"true": True, "yes": True, "false": False, "no": False}


def rules_for(rules: Policy, jobs: Sequence[TraceJob], cluster: SimCluster) -> Policy:
    """`rules` with the trace's queues where it has none, and with each queue's own nodes.

    Raises InvalidSpec for a job of a queue that these rules don't have.
    """
    queues = dict(rules.queues)
    named = sorted({job.queue for job in jobs})
    if not queues:
        queues = {name or "default": QueuePolicy(name or "default") for name in named}
        rules = replace(rules, default_queue="default" if "" in named else next(iter(queues)))
    leaves = set(replace(rules, queues=queues).leaves())
    for name in named:
        if name and name not in leaves:
            raise InvalidSpec(
                f"queue: jobs of the trace are in {name!r}, which is no queue that jobs go to; "
                f"there are {', '.join(sorted(leaves))}",
                field="queue",
            )
    if all(pool.name == SHARED for pool in cluster.pools):
        return replace(rules, queues=queues)
    own = {pool.name for pool in cluster.pools}
    for name, queue in queues.items():
        if name in own:
            queues[name] = replace(queue, labels=(*queue.labels, *cluster.label_of(name)))
    return replace(rules, queues=queues)


def override(rules: Policy, settings: Sequence[str]) -> Policy:
    """`rules` with `queues.NAME.FIELD=VALUE` and `FIELD=VALUE` applied. Raises InvalidSpec naming the path.

    GPUs are whole counts or shares: `queues.a.nominal=16`, of one type `queues.a.nominal.A100=8`.
    """
    for setting in settings:
        path, equals, value = setting.partition("=")
        path = path.strip()
        if not equals:
            raise InvalidSpec(
                f"set: {setting!r} is not PATH=VALUE, for example queues.a.nominal=16", field="set"
            )
        words = path.split(".")
        if words[0] == "queues" and len(words) >= 3:
            rules = _set_queue(rules, path, words[1:], value.strip())
        elif len(words) == 1 and path in _OF_POLICY:
            rules = replace(rules, **{path: _value(path, path, getattr(rules, path), value.strip())})
        else:
            raise InvalidSpec(
                f"set: {path} is unknown; there are queues.NAME.FIELD and {', '.join(sorted(_OF_POLICY))}",
                field=path,
            )
    return rules


def _set_queue(rules: Policy, path: str, words: Sequence[str], value: str) -> Policy:
    # The last word is a field, or the one before it with a GPU type behind; a queue's own name may hold dots.
    kind = None
    if words[-1] not in _OF_QUEUE and len(words) >= 3 and words[-2] in _AMOUNTS:
        kind, words = words[-1], words[:-1]
    name, known = ".".join(words[:-1]), words[-1]
    queue = rules.queues.get(name)
    if queue is None:
        raise InvalidSpec(
            f"set: {path}: there is no queue {name!r}; there are {', '.join(rules.queues)}", field=path
        )
    if known not in _OF_QUEUE:
        raise InvalidSpec(
            f"set: {path}: a queue has no {known!r}; it has {', '.join(sorted(_OF_QUEUE))}", field=path
        )
    if known in _AMOUNTS:
        amounts: Mapping[str, int] = getattr(queue, known) or {}
        new: Any = {**amounts, kind or ANY: _gpus(path, value)}
    elif known == "max_gpus_per_owner":
        new = _gpus(path, value)
    else:
        new = _value(path, known, getattr(queue, known), value)
    return replace(rules, queues={**rules.queues, name: replace(queue, **{known: new})})


def _gpus(path: str, value: str) -> int:
    try:
        units = gpu_units(float(value))
    except (ValueError, OverflowError):
        units = -1
    if units < 0:
        raise InvalidSpec(f"set: {path}: {value!r} is no number of GPUs", field=path)
    return units


def _value(path: str, name: str, old: Any, value: str) -> Any:
    """`value` as the field's kind. A field that may be None holds seconds."""
    if name in _ENUMS:
        kind = _ENUMS[name]
        try:
            return kind(value)
        except ValueError:
            raise InvalidSpec(f"set: {path}: {value!r} is not one of {', '.join(kind)}", field=path) from None
    if isinstance(old, bool):
        if value.lower() not in _WORDS:
            raise InvalidSpec(f"set: {path}: {value!r} is neither true nor false", field=path)
        return _WORDS[value.lower()]
    if isinstance(old, str):
        return value
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not number >= 0 and name != "default_priority":
        raise InvalidSpec(f"set: {path}: {value!r} is no number from 0 on", field=path)
    return int(number) if isinstance(old, int) else number
