"""The world in which a scenario plays: the real state and the real cycle, and nothing happens but what the file says.

A job that is admitted starts at that same moment. From then on only the file moves anything: a job that was told to
stop keeps its GPUs until the file says `release`. `FakeCluster` checks the books after every event, that a second
cycle plans nothing, and that no promised date moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from rm.core.effects import Effect, Release, Reserve, Run, Stop
from rm.core.events import (
    CheckpointReported,
    Event,
    ForeignUseObserved,
    GpuErrorsSeen,
    GpusQuarantined,
    HoldChanged,
    JobAdmitted,
    JobSubmitted,
    LaunchesObserved,
    LaunchFailed,
    NodeCordoned,
    NodeJoined,
    NodeLost,
    NodeTypesObserved,
    NodeUncordoned,
    PlacementReady,
    PlacementReleased,
    PolicyChanged,
    ReserveFailed,
    RunExited,
    RunLost,
    RunStarted,
    StopRequested,
)
from rm.core.gittins import Remaining
from rm.core.model import GPU_TYPE, Attempt, Gang, Job, Kind, NodeShape, Outcome, Status, StopCause, Strategy
from rm.core.policy import ANY, Backfill, Order, Policy, Preempt, QueuePolicy, Reclaim
from rm.core.reservations import needs
from rm.core.resources import GPU_UNIT, Bundle, gpu_units
from rm.core.shapes import Request, resolve
from rm.spec import PRIORITY_NAMES
from rm.testing import FakeCluster


class Ranks(Remaining):
    """Ranks by owner, at any age, where the file says them; as they were learnt for all others."""

    def __init__(self, said: Mapping[str, float]) -> None:
        super().__init__()
        self._said = said

    def rank(self, job: Job, age_s: float) -> float:
        return self._said[job.owner] if job.owner in self._said else super().rank(job, age_s)


class Stage(FakeCluster):
    """A cluster that does what it is told, in rounds."""

    def begin(self) -> None:
        """A round begins: what follows is counted from here."""
        self.mark = len(self.history)
        self.told: set[int] = set()
        self._follow: list[Event] = []

    # --- what a round may say ------------------------------------------------------------------------------

    def play(self, words: Mapping[str, Any]) -> None:
        """Everything of one round happens at one moment, before one cycle."""
        self.begin()
        if "policy" in words:
            self.dates.clear()
            self.policy = read_policy(words["policy"])
        known = {"rank": self._rank, "learn": self._learn, "policy": self._policy, "nodes": self._nodes,
                 "launchable": self._launchable, "launches": self._launches,
                 "launch_failed": self._launch_failed,
                 "lose": self._lose, "foreign": self._foreign, "quarantine": self._quarantine,
                 "broken": self._broken, "cordon": self._cordon, "drain": self._drain,
                 "uncordon": self._uncordon, "release": self._release,
                 "finish": self._finish, "fail": self._fail, "lost": self._lost, "unready": self._unready,
                 "checkpoint": self._checkpoint, "cancel": self._cancel, "hold": self._hold,
                 "unhold": self._unhold, "submit": self._submit}  # fmt: skip
        events: list[Event] = []
        for word, handle in known.items():
            if word in words:
                if word == "submit" and {"nodes", "launchable"} & set(words):
                    self.happen(*events)  # a request is cut for the nodes that are there
                    events = []
                said = handle(words[word])
                self.told |= {id(event) for event in said}
                events += said
        self.happen(*events)
        while self._follow:
            follow, self._follow = self._follow, []
            self.happen(*follow)

    def _rank(self, words: Mapping[str, float]) -> list[Event]:
        self.state.remaining = Ranks({owner: float(seconds) for owner, seconds in words.items()})
        return []

    def _learn(self, words: Iterable[Mapping[str, Any]]) -> list[Event]:
        """Jobs that ended before the story begins."""
        for said in words:
            gang = Gang(Bundle(gpu_units(said["gpus"])))
            job = Job("", 0, "", said["owner"], Kind.COMMAND, gang, 0.0, said.get("queue", "default"))
            for _ in range(said["times"]):
                self.state.remaining.learn(job, said["seconds"])
        return []

    def _policy(self, words: Mapping[str, Any]) -> list[Event]:
        return [PolicyChanged(self.now, self.policy)]

    def _nodes(self, words: Mapping[str, Any]) -> list[Event]:
        joined: list[Event] = []
        for name, said in words.items():
            node = said if isinstance(said, dict) else {"gpus": said}
            labels = {**node.get("labels", {}), **({GPU_TYPE: node["type"]} if "type" in node else {})}
            cpus, memory_gib = node.get("cpus", 64), node.get("memory_gib", 256)
            joined.append(
                NodeJoined(self.now, name, name, node["gpus"], cpus * 1000, memory_gib * 2**30,
                           tuple(sorted(labels.items())))
            )  # fmt: skip
        return joined

    def _launchable(self, words: Iterable[Mapping[str, Any]]) -> list[Event]:
        shapes = tuple(
            NodeShape(
                each["gpus"],
                each.get("cpus", 64) * 1000,
                each.get("memory_gib", 256) * 2**30,
                tuple(sorted({**each.get("labels", {}), **_typed(each)}.items())),
                each["most"],
                each.get("name", ""),
            )
            for each in words
        )
        return [NodeTypesObserved(self.now, shapes)]

    def _launches(self, words: Mapping[str, Any]) -> list[Event]:
        up, booting = (tuple(words.get(each, {}).items()) for each in ("up", "booting"))
        return [LaunchesObserved(self.now, up, booting, returnable=tuple(words.get("returnable", ())))]

    def _launch_failed(self, words: Mapping[str, str]) -> list[Event]:
        return [LaunchFailed(self.now, name, message) for name, message in words.items()]

    def _lose(self, words: Iterable[str]) -> list[Event]:
        events: list[Event] = []
        self.dates.clear()
        for name in words:
            for (job_id, attempt), nodes in list(self.held.items()):
                if name in nodes:
                    self.held.pop((job_id, attempt))
                    events.append(RunLost(self.now, job_id, attempt, f"node {name} died"))
            events.append(NodeLost(self.now, name))
        return events

    def _foreign(self, words: Mapping[str, float]) -> list[Event]:
        return [ForeignUseObserved(self.now, name, gpu_units(gpus), 0, 0) for name, gpus in words.items()]

    def _quarantine(self, words: Mapping[str, float]) -> list[Event]:
        """By node, how many GPUs strays are on; 0: they are gone."""
        self.dates.clear()
        return [GpusQuarantined(self.now, name, gpu_units(gpus)) for name, gpus in words.items()]

    def _broken(self, words: Mapping[str, str]) -> list[Event]:
        """By node, what the driver says of a GPU there."""
        self.dates.clear()
        return [GpuErrorsSeen(self.now, name, why) for name, why in words.items()]

    def _cordon(self, words: Mapping[str, str]) -> list[Event]:
        self.dates.clear()
        return [NodeCordoned(self.now, name, "admin", reason) for name, reason in words.items()]

    def _drain(self, words: Mapping[str, float | None]) -> list[Event]:
        """By node, in how many seconds what runs there is stopped."""
        self.dates.clear()
        return [
            NodeCordoned(self.now, name, "admin", "", True, None if delay is None else self.now + delay)
            for name, delay in words.items()
        ]

    def _uncordon(self, words: Iterable[str]) -> list[Event]:
        return [NodeUncordoned(self.now, name, "admin") for name in words]

    def _release(self, words: Iterable[str]) -> list[Event]:
        """A stopped attempt has ended and its GPUs are seen free."""
        return self._end(words, Outcome(Status.FAILED, "stopped", signal=15))

    def _finish(self, words: Iterable[str]) -> list[Event]:
        return self._end(words, Outcome(Status.SUCCEEDED))

    def _fail(self, words: Iterable[str]) -> list[Event]:
        return self._end(words, Outcome(Status.FAILED, "exited with code 1", rank=0, exit_code=1))

    def _end(self, names: Iterable[str], outcome: Outcome) -> list[Event]:
        events: list[Event] = []
        for name in names:
            number = self._attempt(name).number
            self.held.pop((name, number))
            events += [RunExited(self.now, name, number, outcome), PlacementReleased(self.now, name, number)]
        return events

    def _lost(self, words: Iterable[str] | Mapping[str, str]) -> list[Event]:
        """Runners that die; as a mapping with the node whose fault it was."""
        events: list[Event] = []
        for name in words:
            number = self._attempt(name).number
            node = words[name] if isinstance(words, Mapping) else None
            self.held.pop((name, number))
            events += [
                RunLost(self.now, name, number, "it died", node),
                PlacementReleased(self.now, name, number),
            ]
        return events

    def _unready(self, words: Iterable[str]) -> list[Event]:
        """The next attempts of these jobs cannot be placed: somebody else is quicker."""
        self.unlucky = set(words)
        return []

    def _checkpoint(self, words: Iterable[str]) -> list[Event]:
        return [CheckpointReported(self.now, name, self._attempt(name).number) for name in words]

    def _cancel(self, words: Iterable[str]) -> list[Event]:
        return [StopRequested(self.now, name, StopCause.CANCELLED, "ann") for name in words]

    def _hold(self, words: Iterable[str]) -> list[Event]:
        self.dates.clear()
        return [HoldChanged(self.now, name, True, "admin") for name in words]

    def _unhold(self, words: Iterable[str]) -> list[Event]:
        self.dates.clear()
        return [HoldChanged(self.now, name, False, "admin") for name in words]

    def _submit(self, words: Mapping[str, Mapping[str, Any]]) -> list[Event]:
        events: list[Event] = []
        for name, said in words.items():
            fields = {"gpus": 1, **said} if not {"nodes", "gpus"} & set(said) else dict(said)
            for index in range(fields.pop("times", 1)):
                self._jobs += 1
                each = f"{name}{index + 1}" if "times" in said else name
                events.append(JobSubmitted(self.now, self._job(each, dict(fields))))
        return events

    def _job(self, name: str, said: dict[str, Any]) -> Job:
        gang = resolve(request_of(said), self.state.node_shapes())
        if least := said.pop("min_nodes", 0):
            gang = replace(gang, least=least)
        priority = said.pop("priority", 0)
        return Job(
            name, self._jobs, name, said.pop("owner", "ann"), Kind.COMMAND, gang, self.now,
            queue=said.pop("queue", self.policy.default_queue),
            priority=PRIORITY_NAMES.get(priority, priority),
            time_limit_s=said.pop("limit", None),
            grace_s=said.pop("grace", 0.0),
            preemptible=said.pop("preemptible", True),
            min_runtime_s=said.pop("min_runtime", 0.0),
            max_retries=said.pop("max_retries", 0),
            after=tuple(said.pop("after", ())),
            held=said.pop("held", False),
            **said,
        )  # fmt: skip

    def _attempt(self, name: str) -> Attempt:
        attempt = self.state.jobs[name].attempt
        assert attempt is not None, f"the file speaks of {name} as running, which it is not"
        return attempt

    # --- the world -----------------------------------------------------------------------------------------

    unlucky: set[str] = set()  # noqa: RUF012  # replaced, never changed

    def _answer(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            key = effect.job_id, effect.attempt
            match effect:
                case Reserve() if effect.job_id in self.unlucky:
                    self._follow.append(ReserveFailed(self.now, *key, "somebody else was quicker"))
                    self.unlucky = self.unlucky - {effect.job_id}
                case Reserve():
                    self.held[key] = needs(effect.gang.bundle, effect.placed)
                    self._follow.append(PlacementReady(self.now, *key))
                case Run():
                    self._follow.append(RunStarted(self.now, *key))
                case Release() if self._is_releasing(key):
                    self.held.pop(key, None)
                    self._follow.append(PlacementReleased(self.now, *key))
                case Release() | Stop():
                    pass

    def _is_releasing(self, key: tuple[str, int]) -> bool:
        """Whether nobody has said yet that this attempt is gone. What the file ends is released by the file."""
        job = self.state.jobs.get(key[0])
        return job is not None and job.attempt is not None and job.attempt.number == key[1]

    # --- what the round brought ----------------------------------------------------------------------------

    def decisions(self) -> list[str]:
        """What the scheduler, and nobody else, decided in this round, in order."""
        said = []
        for event in self.history[self.mark :]:
            if isinstance(event, JobAdmitted):
                said.append(f"{event.job_id} -> {self._places(event)}")
            elif isinstance(event, StopRequested) and id(event) not in self.told:
                match event.cause:
                    case StopCause.PREEMPTED:
                        said.append(f"evict {event.job_id} for {event.by}")
                    case StopCause.RESIZED:
                        said.append(f"shrink {event.job_id} for {event.by}")
                    case other:
                        said.append(f"stop {event.job_id}: {other}")
            elif isinstance(event, NodeCordoned) and id(event) not in self.told:
                said.append(f"cordon {event.node_id}")
            elif isinstance(event, LaunchFailed) and id(event) not in self.told:
                said.append(f"failed {event.node_type}: {event.message}")
        return said

    def wanted(self) -> list[str]:
        """What is asked of the autoscaler: `2 a100 for b, c`, with what is kept beside it: `1 a100 + n1 x4 for b`."""
        said = []
        for ask in self.state.launches.wanted.asks:
            counts = Counter(ask.node_types)
            parts = [f"{count} {name}" for name, count in sorted(counts.items())]
            parts += [f"{node} x{units / GPU_UNIT:g}" for node, units in ask.kept]
            said.append(f"{' + '.join(parts)} for {', '.join(ask.jobs)}")
        return said

    def _places(self, event: JobAdmitted) -> str:
        job = self.state.jobs.get(event.job_id) or self.ended[event.job_id]
        if job.gang.bundle.gpu_units < GPU_UNIT:
            return ", ".join(f"{each.node_id}[{each.slots[0]}]" for each in event.placed)
        runs = ((node, len(list(run))) for node, run in groupby(each.node_id for each in event.placed))
        return ", ".join(f"{node} x{count}" if count > 1 else node for node, count in runs)


def _typed(said: Mapping[str, Any]) -> dict[str, str]:
    return {GPU_TYPE: said["type"]} if "type" in said else {}


def request_of(said: dict[str, Any]) -> Request:
    """The request in the words of a file; the words are taken out of `said`."""
    gpus, nodes, per_node = said.pop("gpus", None), said.pop("nodes", None), said.pop("gpus_per_node", None)
    types = said.pop("type", ())
    return Request(
        None if nodes else gpu_units(gpus),
        nodes,
        gpu_units(per_node) if nodes else None,
        cpu_milli_per_gpu=said.pop("cpus_per_gpu", 0) * 1000,
        memory_bytes_per_gpu=said.pop("memory_gib_per_gpu", 0) * 2**30,
        strategy=Strategy(said.pop("strategy", "PACK")),
        gpu_types=(types,) if isinstance(types, str) else tuple(types),
        labels=tuple(sorted(said.pop("labels", {}).items())),
    )


def describe(gang: Gang) -> str:
    """`2 x 4`: bundles × GPUs."""
    return f"{gang.count} x {gang.bundle.gpu_units / GPU_UNIT:g}"


def read_policy(words: Mapping[str, Any]) -> Policy:
    """A policy in the words of a file. Amounts are GPUs; a plain number is of the kind `*`."""
    words = dict(words)
    queues = {name: _queue(name, said or {}) for name, said in words.pop("queues", {"default": {}}).items()}
    order, backfill = words.pop("order", Order.FAIR), words.pop("backfill", Backfill.EASY)
    first = next(name for name in queues if all(other.parent != name for other in queues.values()))
    return Policy(
        queues=queues,
        default_queue=words.pop("default_queue", first),
        order=Order(order),
        backfill=Backfill(backfill),
        **words,
    )


def _queue(name: str, words: Mapping[str, Any]) -> QueuePolicy:
    said = dict(words)
    for field in ("nominal", "borrow_limit", "lend_limit"):
        if field in said:
            amounts = said[field] if isinstance(said[field], dict) else {ANY: said[field]}
            said[field] = {kind: gpu_units(gpus) for kind, gpus in amounts.items()}
    if "max_gpus_per_owner" in said:
        said["max_gpus_per_owner"] = gpu_units(said["max_gpus_per_owner"])
    said["labels"] = tuple(sorted(said.get("labels", {}).items()))
    said["preempt"] = Preempt(said.get("preempt", "never"))
    said["reclaim"] = Reclaim(said.get("reclaim", "any"))
    return QueuePolicy(name, **said)
