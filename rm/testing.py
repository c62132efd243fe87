"""A fake runtime: the same effects, no Ray, no waiting. Shipped so that others can test against the core too.

`FakeCluster` is a whole resource manager in one thread on a virtual clock: the real state and the real cycle,
with a world that answers each effect with the event that Ray would have caused. It keeps its own books of what
is held on each node, independent of the state's, and `check` compares the two.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rm.core.backfill import still_good
from rm.core.cycle import Notes
from rm.core.effects import Effect, Release, Reserve, Run, Stop
from rm.core.events import (
    Event,
    GpusQuarantined,
    JobAdmitted,
    JobSubmitted,
    NodeCordoned,
    NodeJoined,
    NodeLost,
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
from rm.core.model import Gang, Job, Kind, Outcome, Status, StopCause, Strategy, Stray
from rm.core.policy import Policy
from rm.core.reservations import Reservation, needs
from rm.core.resources import GPU_UNIT, NOTHING, Amount, Bundle, gpu_units
from rm.core.scaleup import cuts, decide
from rm.core.state import ClusterState
from rm.errors import InternalError


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the fake world does with a job's attempts, by attempt number (the last entry repeats).

    Entries: "ok", "fail", "lost" (the runner dies halfway), "unready" (the group can't be made).
    """

    duration_s: float = 10.0
    attempts: tuple[str, ...] = ("ok",)

    def of(self, attempt: int) -> str:
        return self.attempts[min(attempt, len(self.attempts)) - 1]


@dataclass(slots=True)
class FakeCluster:
    """State, cycle and world in one. `now` is virtual: it moves only when an event is due."""

    reserve_s: float = 0.01
    start_s: float = 0.5
    release_s: float = 0.1
    now: float = 0.0
    policy: Policy = field(default_factory=Policy)
    state: ClusterState = field(init=False)
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    ended: dict[str, Job] = field(default_factory=dict)
    history: list[Event] = field(default_factory=list)
    held: dict[tuple[str, int], dict[str, Amount]] = field(default_factory=dict)
    """The world's own books: (job id, attempt) → what it has by node, as long as the group exists."""
    dates: dict[str, Reservation] = field(default_factory=dict)
    """What each reserved job was promised, as long as it keeps its reservation."""
    _due: list[tuple[float, int, Event]] = field(default_factory=list)
    _count: int = 0
    _jobs: int = 0
    _running: dict[tuple[str, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = ClusterState(self.policy)

    # --- the world's inhabitants ---------------------------------------------------------------------------

    def add_node(self, node_id: str, gpus: int, **labels: str) -> None:
        marks = tuple(sorted(labels.items()))
        self.happen(NodeJoined(self.now, node_id, node_id, gpus, 64_000, 2**38, marks))

    def lose_node(self, node_id: str) -> None:
        """The node dies: its bundles are gone at once, and every attempt that had one there is lost."""
        for (job_id, attempt), nodes in list(self.held.items()):
            if node_id in nodes and self._running.pop((job_id, attempt), ""):
                self._later(0.0, RunLost(self.now, job_id, attempt, f"node {node_id} died"))
        self.dates.clear()
        self.happen(NodeLost(self.now, node_id))

    def cordon(
        self, node_id: str, reason: str = "", *, draining: bool = False, deadline: float | None = None
    ) -> None:
        """As an administrator would. `deadline`: a moment on the virtual clock."""
        self.dates.clear()
        self.happen(NodeCordoned(self.now, node_id, "someone", reason, draining, deadline))

    def uncordon(self, node_id: str) -> None:
        self.happen(NodeUncordoned(self.now, node_id, "someone"))

    def quarantine(self, node_id: str, gpus: int) -> None:
        """As the audit would, for strays on so many GPUs."""
        self.dates.clear()
        strays = tuple(Stray(gpu, 100 + gpu, "python", "somebody", 2**31) for gpu in range(gpus))
        self.happen(GpusQuarantined(self.now, node_id, gpus * GPU_UNIT, strays))

    def submit(
        self,
        num_gpus: float = 1,
        *,
        count: int = 1,
        behaviour: Behaviour | None = None,
        strategy: Strategy = Strategy.PACK,
        gpu_types: tuple[str, ...] = (),
        cpu_milli: int = 0,
        memory_bytes: int = 0,
        kind: Kind = Kind.COMMAND,
        least: int = 0,
        owner: str = "someone",
        name: str = "",
        **fields: object,
    ) -> str:
        seq = self._jobs = self._jobs + 1
        job_id = f"j{seq}"
        self.behaviours[job_id] = behaviour or Behaviour()
        bundle = Bundle(gpu_units(num_gpus), cpu_milli, memory_bytes)
        gang = Gang(bundle, count, strategy, gpu_types, least=least)
        job = Job(job_id, seq, name or job_id, owner, kind, gang, self.now, **fields)  # type: ignore[arg-type]
        self.happen(JobSubmitted(self.now, job))
        return job_id

    def cancel(self, job_id: str) -> None:
        self.happen(StopRequested(self.now, job_id, StopCause.CANCELLED, "someone"))

    # --- time ----------------------------------------------------------------------------------------------

    def happen(self, *events: Event) -> None:
        """Apply events, then one cycle, then answer the effects: what the writer does, without a ledger."""
        effects: list[Effect] = []
        for event in events:
            effects += self._apply(event)
        for due in self.state.due(self.now):
            effects += self._apply(due)
        for cut in cuts(self.state, self.now):
            effects += self._apply(cut)
        decisions = decide(self.state, self.now).events
        for decision in decisions:
            effects += self._apply(decision)
        started = any(isinstance(each, JobAdmitted) for each in decisions)
        self._check_dates(started)
        wanted = self.state.launches.wanted
        for afresh in (False, True):
            if afresh and isinstance(notes := self.state.plans.get("cycle"), Notes):
                # Nor does one that trusts no other to have seen that nothing is to be done.
                notes.quiet = None
            again = decide(self.state, self.now).events
            if again:
                raise InternalError(f"a second cycle at the same moment plans {again}")
            if started and not afresh:
                wanted = self.state.launches.wanted  # what is left on nodes that boot may be packed anew
            if self.state.launches.wanted != wanted:
                raise InternalError(
                    f"at the same moment {wanted} and {self.state.launches.wanted} are wanted"
                )
        self._answer(effects)
        self.check()

    def apply_policy(self, policy: Policy) -> None:
        self.dates.clear()
        self.policy = policy
        self.happen(PolicyChanged(self.now, policy))

    def next_due(self) -> float | None:
        """When the next thing is due."""
        alarm = self.state.next_due(self.now)
        moments = [alarm] if alarm is not None else []
        return min([*moments, *(each[0] for each in self._due[:1])], default=None)

    def step(self) -> bool:
        """Move to the next thing that is due. False where nothing ever will be."""
        alarm = self.state.next_due(self.now)
        if self._due and (alarm is None or self._due[0][0] <= alarm):
            at, _, event = heapq.heappop(self._due)
            self.now = max(self.now, at)
            self.happen(event)
            return True
        if alarm is not None:
            self.now = alarm
            self.happen()
            return True
        return False

    def run(self, until: Callable[[], bool] = lambda: False, most: int = 100_000) -> None:
        """Step until nothing is due or `until` says stop. Raises InternalError when it never ends."""
        for _ in range(most):
            if until() or not self.step():
                return
        raise InternalError(f"still busy after {most} steps")

    # --- the world -------------------------------------------------------------------------------------------

    def _apply(self, event: Event) -> list[Effect]:
        self.history.append(event)
        if isinstance(event, JobAdmitted):
            self._must_be_free(event)
        effects = self.state.apply(event)
        for job in self.state.take_changes():
            if job.status.terminal:
                if job.id in self.ended:
                    raise InternalError(f"{job.id} ended twice")
                self.ended[job.id] = job
        return effects

    def _must_be_free(self, event: JobAdmitted) -> None:
        gang = self.state.jobs[event.job_id].gang
        for node_id, wanted in needs(gang.bundle, event.placed).items():
            node = self.state.nodes[node_id]
            there = sum((nodes.get(node_id, NOTHING) for nodes in self.held.values()), NOTHING)
            if wanted.beyond(Amount(node.gpu_slots * GPU_UNIT, node.cpu_milli, node.memory_bytes) - there):
                raise InternalError(f"{event.job_id} was given what others hold of {node_id}")

    def _answer(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            key = effect.job_id, effect.attempt
            behaviour = self.behaviours[effect.job_id]
            fate = behaviour.of(effect.attempt)
            match effect:
                case Reserve():
                    self._reserve(effect, fate)
                case Run():
                    self._running[key] = fate
                    self._later(self.start_s, RunStarted(0, *key))
                    end = self.start_s + behaviour.duration_s
                    self._later(end, self._end_of(key, fate, effect.placed[0].node_id))
                case Stop():
                    if self._running.pop(key, ""):
                        stopped = Outcome(Status.FAILED, "stopped", signal=15)
                        self._later(min(effect.grace_s, 1.0), RunExited(0, *key, stopped))
                case Release():
                    self._running.pop(key, None)
                    self._later(self.release_s, PlacementReleased(0, *key))

    def _reserve(self, effect: Reserve, fate: str) -> None:
        key = effect.job_id, effect.attempt
        if fate == "unready" or any(each.node_id not in self.state.nodes for each in effect.placed):
            self._later(self.reserve_s, ReserveFailed(0, *key, "somebody else was quicker"))
            return
        self.held[key] = needs(effect.gang.bundle, effect.placed)
        self._later(self.reserve_s, PlacementReady(0, *key))

    @staticmethod
    def _end_of(key: tuple[str, int], fate: str, node_id: str) -> Event:
        if fate == "lost":
            return RunLost(0, *key, "the runner died", node_id)
        if fate == "fail":
            return RunExited(0, *key, Outcome(Status.FAILED, "exited with code 1", rank=0, exit_code=1))
        return RunExited(0, *key, Outcome(Status.SUCCEEDED))

    def _later(self, delay_s: float, event: Event) -> None:
        self._count += 1
        at = self.now + delay_s
        if isinstance(event, PlacementReleased):
            self.held.pop((event.job_id, event.attempt), None)
        stamped = type(event)(at, *(getattr(event, name) for name in event.__slots__ if name != "at"))
        heapq.heappush(self._due, (at, self._count, stamped))

    # --- the books -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """The state's own invariants, and that it charges at least what the world holds, node by node."""
        self.state.check()
        charged: dict[str, Amount] = {}
        for job in self.state.jobs.values():
            placed = job.attempt.placed if job.attempt else ()
            for node_id, amount in needs(job.gang.bundle, placed).items():
                charged[node_id] = charged.get(node_id, NOTHING) + amount
        for nodes in self.held.values():
            for node_id, amount in nodes.items():
                charged[node_id] = charged.get(node_id, NOTHING) - amount
        short = {node_id: left for node_id, left in charged.items() if NOTHING.beyond(left)}
        if short:
            raise InternalError(f"held in the world and not charged: {short}")

    def _check_dates(self, admitted: bool) -> None:
        """No backfill moves a promised date.

        What a cycle let pass a reservation leaves that reservation good; and without an admission (somebody with a
        better right may come and take) a date that lies ahead comes no later, as long as it is on the same nodes'
        classes: where somebody with a better right has a reservation there now, others may have no date so early.
        A date that waits for nodes to boot is an estimate and no promise.
        """
        notes = self.state.plans.get("cycle")
        found = notes.reservations if isinstance(notes, Notes) else {}
        ahead = {each.job_id: each for each in found.values() if each.at > self.now and not each.evicting}
        for job_id, reservation in ahead.items():
            job = self.state.jobs[job_id]
            if not still_good(reservation, self.state, job, self.now):
                raise InternalError(f"{job_id} can't have {reservation.need} at {reservation.at} any more")
            before = self.dates.get(job_id, reservation)
            later = reservation.at > before.at and reservation.classes == before.classes
            if later and not admitted and not before.boots:
                raise InternalError(f"{job_id} was promised {before.at} and now gets {reservation.at}")
        self.dates = ahead
