"""rm.yaml: what administrators decide about queues, read field by field and made into a `Policy`.

Queues nest: those below `queues:` of a queue are its parts, and jobs go to the queues that have none below. Names are
unique in the whole file, so that a queue can move to another team and its jobs need not know. What a team says about
`preempt`, `reclaim`, `stopped`, `labels`, the time limits and `default_priority` holds for the queues below it,
unless they say otherwise. Every error names the path of the field, its line, and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rm.core.policy import ANY, DAY_S, Backfill, Order, Policy, Preempt, QueuePolicy, Reclaim
from rm.core.resources import GPU_UNIT, gpu_count, gpu_units
from rm.errors import InvalidSpec
from rm.lending import Owned, owned
from rm.rights import is_name
from rm.spec import PRIORITY_NAMES, did_you_mean, parse_duration
from rm.yaml_text import Document, Path, read

MOST_GPUS = 1_000_000
MOST_S = 100 * 365 * DAY_S
MOST_FAILURES = 1_000
MOST_LEVELS = 10
MOST_PRICE = 1_000_000
MOST_ERRORS = 20
"""Errors that one message lists."""
DEFAULT = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
_WORDS = {"yes": True, "on": True, "no": False, "off": False}
Word = TypeVar("Word", bound=StrEnum)


# --- fields ------------------------------------------------------------------------------------------------


def _gpus(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number of GPUs, not {_shown(value)}")
    if not 0 <= value <= MOST_GPUS:
        raise ValueError(f"must be from 0 to {MOST_GPUS} GPUs, not {_shown(value)}")
    if value > 1 and value != int(value):
        raise ValueError(f"above 1 must be a whole number of GPUs, not {_shown(value)}")
    if value and not gpu_units(value):
        raise ValueError(f"below 0.0001 of a GPU can't be accounted, got {_shown(value)}")
    return value


def _amounts(value: Any) -> Any:
    """A plain number counts GPUs of all types that no quota names."""
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("is empty: leave it out, or say 0")
        return value
    if isinstance(value, str | list) or value is None:
        raise ValueError(f"must be a number of GPUs, or a number for each GPU type, not {_shown(value)}")
    return {ANY: _gpus(value)}


def _gpu_type(value: str) -> str:
    if value != ANY and not (value.strip() == value and value.isprintable() and 0 < len(value) <= 100):
        raise ValueError(f"must be a GPU type such as A100, or '*' for all others, not {_shown(value)}")
    return value


def _queue_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"must be a queue's name (letters, digits, '.', '_', '-', '/'), not {_shown(value)}")
    return value


def _span(value: Any) -> float:
    try:
        seconds = None if value is None else parse_duration(value)
    except (ValueError, OverflowError):
        seconds = None
    if seconds is None:
        raise ValueError(f"must be a duration such as 90, '15m', '2h' or '1:30:00', not {_shown(value)}")
    if not seconds <= MOST_S:
        raise ValueError(f"must be at most 100 years, not {_shown(value)}")
    return seconds


def _some_span(value: Any) -> float:
    seconds = _span(value)
    if seconds < 1e-3:
        raise ValueError(f"must be more than 0 seconds, not {_shown(value)}")
    return seconds


def _flag(value: Any) -> bool:
    if isinstance(value, str):
        value = _WORDS.get(value.lower(), value)
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {_shown(value)}")
    return value


def _weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e6:
        raise ValueError(f"must be a number from 0.000001 to 1000000, not {_shown(value)}")
    return value


def _priority(value: Any) -> int:
    if isinstance(value, str) and value in PRIORITY_NAMES:
        return PRIORITY_NAMES[value]
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 1_000_000:
        names = ", ".join(PRIORITY_NAMES)
        raise ValueError(f"must be one of {names} or from -1000000 to 1000000, not {_shown(value)}")
    return value


def _failures(value: Any) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not (value == 0 or 2 <= value <= MOST_FAILURES)
    ):
        raise ValueError(f"must be from 2 to {MOST_FAILURES} failures, or 0 for never, not {_shown(value)}")
    return value


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be names and values of node labels, not {_shown(value)}")
    for key, text in value.items():
        if not key or not isinstance(text, str) or not text:
            raise ValueError(f"the value of {key!r} must be text, not {_shown(text)}; quotes make it so")
    return dict(value)


def _prices(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be node types and what one costs in an hour, not {_shown(value)}")
    for name, price in value.items():
        number = isinstance(price, int | float) and not isinstance(price, bool)
        if not number or not 0 <= price <= MOST_PRICE:
            raise ValueError(
                f"the price of {name} must be from 0 to {MOST_PRICE} an hour, not {_shown(price)}"
            )
    return {str(name): float(price) for name, price in value.items()}


def _owners(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) and each for each in value):
        raise ValueError(f"must be a list of owners such as [ada, bob], not {_shown(value)}")
    for each in value:
        if not is_name(each) or each != each.strip():
            raise ValueError(
                f"must be names of printable characters without blanks around, not {_shown(each)}"
            )
    return tuple(dict.fromkeys(value))


def _word(kind: type[Word]) -> Any:
    def check(value: Any) -> Word:
        if isinstance(value, str) and value in list(kind):
            return kind(value)
        raise ValueError(f"must be one of {', '.join(kind)}, not {_shown(value)}")

    return BeforeValidator(check)


def _given(value: Any) -> Any:
    """None is what is not said; `nominal:` with nothing behind it is a slip."""
    if value is None:
        raise ValueError("is empty: give a value, or leave the line out")
    return value


def _empty_is_new(value: Any) -> Any:
    return {} if value is None else value


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


Gpus = Annotated[float, BeforeValidator(_gpus)]
Amounts = Annotated[dict[Annotated[str, AfterValidator(_gpu_type)], Gpus], BeforeValidator(_amounts)]
Span = Annotated[float, BeforeValidator(_span)]
SomeSpan = Annotated[float, BeforeValidator(_some_span)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Weight = Annotated[float, BeforeValidator(_weight)]
PriorityValue = Annotated[int, BeforeValidator(_priority)]
Labels = Annotated[dict[str, str], BeforeValidator(_labels)]
Prices = Annotated[dict[str, float], BeforeValidator(_prices)]
Owners = Annotated[tuple[str, ...], BeforeValidator(_owners)]
QueueName = Annotated[str, AfterValidator(_queue_name)]
GIVEN = BeforeValidator(_given)


class QueueSettings(BaseModel):
    """One queue of rm.yaml. Amounts are GPUs by type, durations seconds. None: not said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nominal: Annotated[Amounts | None, GIVEN] = None
    borrow_limit: Annotated[Amounts | None, GIVEN] = None
    lend_limit: Annotated[Amounts | None, GIVEN] = None
    weight: Weight = 1.0
    preempt: Annotated[Annotated[Preempt, _word(Preempt)] | None, GIVEN] = None
    reclaim: Annotated[Annotated[Reclaim, _word(Reclaim)] | None, GIVEN] = None
    stopped: Annotated[Flag | None, GIVEN] = None
    labels: Annotated[Labels | None, GIVEN] = None
    max_time_limit: Annotated[SomeSpan | None, GIVEN] = None
    default_time_limit: Annotated[SomeSpan | None, GIVEN] = None
    default_priority: Annotated[PriorityValue | None, GIVEN] = None
    max_gpus_per_owner: Annotated[Gpus | None, GIVEN] = None
    queues: Queues = Field(default_factory=dict)


Queues = Annotated[
    dict[QueueName, Annotated[QueueSettings, BeforeValidator(_empty_is_new)]], BeforeValidator(_empty_is_new)
]
QueueSettings.model_rebuild()


class NodeFailures(BaseModel):
    """When a node that fails is cordoned: after `limit` infrastructure failures within `window` seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: Annotated[int, BeforeValidator(_failures)] = 3
    window: SomeSpan = 600.0


class Settings(BaseModel):
    """The whole file. `parse` is the way in, `policy` the way on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queues: Queues = Field(default_factory=dict)
    default_queue: str = ""
    """Where jobs go that name no queue. Empty: the queue called default, or the only one."""
    order: Annotated[Order, _word(Order)] = Order.FAIR
    backfill: Annotated[Backfill, _word(Backfill)] = Backfill.EASY
    half_life: SomeSpan = 7 * DAY_S
    max_age: SomeSpan = DAY_S
    patience: Span = 0.0
    min_runtime: Span = 0.0
    settle: Span = 60.0
    predicted_limits: Flag = False
    node_failures: NodeFailures = NodeFailures()
    boot_timeout: SomeSpan = 900.0
    boot_time: Span = 240.0
    prices: Prices = Field(default_factory=dict)
    admins: Owners = ()

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Settings from the text of an rm.yaml. Raises InvalidSpec that names every bad field and its line."""
        document = read(text)
        if document.value is not None and not isinstance(document.value, dict):
            raise InvalidSpec("rm.yaml: must be fields and values, such as `queues:`")
        try:
            settings = cls.model_validate(document.value or {})
        except ValidationError as error:
            raise _invalid([_fault(each) for each in error.errors()], document) from None
        faults = list(_contradictions(settings))
        if faults:
            raise _invalid(faults, document)
        return settings

    def policy(self) -> Policy:
        """The same in the core's words."""
        rules = {
            "order": self.order,
            "backfill": self.backfill,
            "half_life_s": self.half_life,
            "max_age_s": self.max_age,
            "patience_s": self.patience,
            "predicted_limits": self.predicted_limits,
            "min_runtime_s": self.min_runtime,
            "settle_s": self.settle,
            "node_failure_limit": self.node_failures.limit,
            "node_failure_window_s": self.node_failures.window,
            "boot_timeout_s": self.boot_timeout,
            "boot_s": self.boot_time,
            "prices": self.prices,
            "admins": self.admins,
        }
        places = list(_places(self))
        if not places:
            return Policy(**cast("dict[str, Any]", rules))
        queues = {place.name: _queue_policy(place) for place in places}
        default = self.default_queue or _only_default(places)
        return Policy(queues=queues, default_queue=default, **cast("dict[str, Any]", rules))

    def warnings(self) -> list[str]:
        """What is allowed and probably not meant, each with the path of the field."""
        return list(_doubts(self))


# --- the tree ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """One queue and where it stands. `said`: its own words and those of the teams above."""

    name: str
    parent: str | None
    path: Path
    queue: QueueSettings
    said: Mapping[str, Any]

    @property
    def is_leaf(self) -> bool:
        return not self.queue.queues

    def at(self, *names: str) -> Path:
        return (*self.path, *names)


_HANDED_DOWN = ("preempt", "reclaim", "max_time_limit", "default_time_limit", "default_priority")


def _places(settings: Settings) -> Iterator[_Place]:
    """Every queue, teams before what is below them."""

    def walk(
        queues: Mapping[str, QueueSettings], above: _Place | None, path: Path, said: Mapping[str, Any]
    ) -> Iterator[_Place]:
        for name, queue in queues.items():
            own = {each: value for each in _HANDED_DOWN if (value := getattr(queue, each)) is not None}
            mine = {
                **said,
                **own,
                "stopped": said.get("stopped", False) or bool(queue.stopped),
                "labels": {**said.get("labels", {}), **(queue.labels or {})},
            }
            place = _Place(name, above.name if above else None, (*path, name), queue, mine)
            yield place
            yield from walk(queue.queues, place, place.at("queues"), mine)

    yield from walk(settings.queues, None, ("queues",), {})


def _queue_policy(place: _Place) -> QueuePolicy:
    queue, said, standard = place.queue, place.said, QueuePolicy(place.name)
    owner_limit = queue.max_gpus_per_owner
    return QueuePolicy(
        name=place.name,
        parent=place.parent,
        nominal=_units(queue.nominal),
        borrow_limit=_units(queue.borrow_limit),
        lend_limit=_units(queue.lend_limit),
        weight=queue.weight,
        preempt=said.get("preempt", standard.preempt),
        reclaim=said.get("reclaim", standard.reclaim),
        stopped=said["stopped"],
        labels=tuple(sorted(said["labels"].items())),
        max_time_limit_s=said.get("max_time_limit"),
        default_time_limit_s=said.get("default_time_limit"),
        default_priority=said.get("default_priority", standard.default_priority),
        max_gpus_per_owner=None if owner_limit is None else gpu_units(owner_limit),
    )


def _units(amounts: Mapping[str, float] | None) -> dict[str, int] | None:
    return None if amounts is None else {kind: gpu_units(gpus) for kind, gpus in amounts.items()}


def _only_default(places: list[_Place]) -> str:
    """The queue for jobs that name none, where the file does not say; "" where it would have to."""
    leaves = [place.name for place in places if place.is_leaf]
    return DEFAULT if DEFAULT in leaves else leaves[0] if len(leaves) == 1 else ""


# --- what contradicts itself -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fault:
    path: Path
    message: str
    known: tuple[str, ...] = field(default=())


def _contradictions(settings: Settings) -> Iterator[_Fault]:
    """What no field can see by itself."""
    places = list(_places(settings))
    first: dict[str, _Place] = {}
    for place in places:
        other = first.setdefault(place.name, place)
        if other is not place:
            yield _Fault(
                place.path, f"the name is taken by {'.'.join(other.path)}; names are unique in the file"
            )
        if len(place.path) > 2 * MOST_LEVELS:
            yield _Fault(place.path, f"queues nest at most {MOST_LEVELS} levels deep")
        if place.queue.max_gpus_per_owner is not None and not place.is_leaf:
            below = ", ".join(place.queue.queues)
            yield _Fault(
                place.at("max_gpus_per_owner"),
                f"counts in one queue, and {place.name} has queues below it; set it on each of {below}",
            )
        most, usual = place.said.get("max_time_limit"), place.said.get("default_time_limit")
        if most is not None and usual is not None and usual > most:
            where = "default_time_limit" if place.queue.default_time_limit is not None else "max_time_limit"
            yield _Fault(place.at(where), f"the default of {usual:g} s is above the maximum of {most:g} s")
    yield from _default_fault(settings, places)


def _default_fault(settings: Settings, places: list[_Place]) -> Iterator[_Fault]:
    leaves = [place.name for place in places if place.is_leaf] or [DEFAULT]
    listed = ", ".join(leaves[:10]) + (" …" if len(leaves) > 10 else "")
    wanted = settings.default_queue
    if not wanted:
        if places and not _only_default(places):
            yield _Fault(
                ("default_queue",), f"is missing: say which of {listed} gets the jobs that name no queue"
            )
    elif wanted not in leaves:
        if any(place.name == wanted for place in places):
            yield _Fault(
                ("default_queue",),
                f"{wanted!r} has queues below it, and jobs go only to those that have none: {listed}",
            )
        else:
            yield _Fault(
                ("default_queue",), f"there is no queue {wanted!r}; {did_you_mean(wanted, set(leaves))}"
            )


def _fault(error: Any) -> _Fault:
    """Ours for one of pydantic's."""
    path = tuple(str(part) for part in error["loc"] if part != "[key]")
    match error["type"]:
        case "extra_forbidden":
            fields = _fields_at(path)
            if path[-1] == "parent":
                return _Fault(path, "unknown field; a queue stands below `queues:` of its parent instead")
            return _Fault(path, f"unknown field; {did_you_mean(path[-1], fields)}")
        case "value_error":
            return _Fault(path, error["msg"].removeprefix("Value error, "))
        case "dict_type" | "model_type":
            what = "queues by name" if path[-1] == "queues" else "the fields of a queue"
            if path == ("node_failures",):
                what = "`limit` and `window`, such as {limit: 3, window: 10m}"
            return _Fault(path, f"must be {what}, not {_shown(error['input'])}")
        case "string_type":
            return _Fault(path, f"must be text, not {_shown(error['input'])}; quotes make it so")
        case _:
            return _Fault(path, f"{error['msg']}, not {_shown(error['input'])}")


def _fields_at(path: Path) -> set[str]:
    """The fields that may stand where the last one of `path` does."""
    if len(path) == 1:
        return set(Settings.model_fields)
    return set(NodeFailures.model_fields if path[0] == "node_failures" else QueueSettings.model_fields)


def _invalid(faults: list[_Fault], document: Document) -> InvalidSpec:
    said = []
    for fault in faults[:MOST_ERRORS]:
        line = document.line(fault.path)
        said.append(f"{'.'.join(fault.path)}: {fault.message}" + (f" (line {line})" if line else ""))
    if len(faults) > MOST_ERRORS:
        said.append(f"and {len(faults) - MOST_ERRORS} more")
    return InvalidSpec("; ".join(said), field=".".join(faults[0].path))


# --- what is probably not meant ----------------------------------------------------------------------------


def _doubts(settings: Settings) -> Iterator[str]:
    policy, places = settings.policy(), list(_places(settings))
    if not places:
        return
    if policy.queues[policy.default_queue].stopped:
        yield f"default_queue: {policy.default_queue} is stopped: jobs that name no queue will not start"
    yield from _idle_rules(settings, places)
    if all(place.queue.nominal is None for place in places):
        for place in places:
            for name in ("borrow_limit", "lend_limit"):
                if getattr(place.queue, name) is not None:
                    yield f"{_dotted(place.at(name))}: no queue has a nominal quota, so nothing is limited"
        return
    yield from _uncovered(policy, places)
    quotas = owned(policy)
    for place in places:
        yield from _quota_doubts(policy, place, quotas)


def _idle_rules(settings: Settings, places: list[_Place]) -> Iterator[str]:
    """Fields that the chosen order or backfill never reads."""
    if settings.order is not Order.FAIR:
        if "half_life" in settings.model_fields_set:
            yield f"half_life: has no effect with order: {settings.order}"
        for place in places:
            if place.queue.weight != 1.0:
                yield f"{_dotted(place.at('weight'))}: has no effect with order: {settings.order}"
    if settings.predicted_limits and settings.backfill is not Backfill.EASY:
        yield f"predicted_limits: has no effect with backfill: {settings.backfill}"


def _uncovered(policy: Policy, places: list[_Place]) -> Iterator[str]:
    """A plain number leaves out the types that anybody names."""
    kinds = sorted(policy.kinds())
    plain = [
        place for place in places if place.queue.nominal is not None and set(place.queue.nominal) == {ANY}
    ]
    for kind in kinds if plain else ():
        names = ", ".join(place.name for place in plain)
        yield (
            f"{_dotted(plain[0].at('nominal'))}: {kind} is counted apart, because a quota names it; "
            f"none of it is owned by {names}; `{kind}: 0` beside '*' says that it is meant"
        )


def _quota_doubts(policy: Policy, place: _Place, quotas: Mapping[tuple[str, str], Owned]) -> Iterator[str]:
    queue = place.queue
    for kind, limit in (queue.lend_limit or {}).items():
        quota = quotas[place.name, kind].quota
        if gpu_units(limit) > quota:
            yield (
                f"{_path_of(place, 'lend_limit', queue.lend_limit, kind)}: {limit:g} is more than the "
                f"{_count(quota)} that {place.name} owns, so it limits nothing"
            )
    for kind, limit in (queue.borrow_limit or {}).items():
        if limit == 0 and place.is_leaf and not quotas[place.name, kind].quota:
            yield (
                f"{_path_of(place, 'borrow_limit', queue.borrow_limit, kind)}: {place.name} owns nothing of it and "
                "may borrow nothing, so it can never hold any"
            )
    for kind, own in (queue.nominal or {}).items():
        below = sum((policy.queues[name].nominal or {}).get(kind, 0) for name in queue.queues)
        if below and gpu_units(own) >= below:
            yield (
                f"{_path_of(place, 'nominal', queue.nominal, kind)}: is in addition to the {_count(below)} of its "
                f"queues, {_count(below + gpu_units(own))} together; leave it out if it was meant as their sum"
            )


def _path_of(place: _Place, name: str, amounts: Mapping[str, float] | None, kind: str) -> str:
    plain = amounts is not None and set(amounts) == {ANY}
    return _dotted(place.at(name) if plain else place.at(name, kind))


def _dotted(path: Path) -> str:
    return ".".join(path)


def _count(units: int) -> str:
    return f"{gpu_count(units):g}" if units % GPU_UNIT else str(units // GPU_UNIT)
