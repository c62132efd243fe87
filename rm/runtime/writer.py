"""The one writer: events in, decisions committed, effects out.

    inbox ──► apply ──► schedule ──► commit (one transaction) ──► publish, reply, effects
      ▲                                                                         │
      └────────────────────────────── events ───────────────────────────────────┘

One batch at a time: what arrives while a commit is under way waits for the next, so under load commits are
grouped by themselves. Nothing that a batch decided is visible, answered or carried out before its commit.
If the commit fails, the batch never was: requests get the error, facts from the world go back to the head of
the inbox, and the state is read anew from the ledger, which is the truth.

Knows neither Ray nor a wall clock: both come in through the constructor, so the same writer runs under the
fake runtime of `rm.testing`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from types import MappingProxyType

from rm.core.capacity import Totals
from rm.core.effects import Effect
from rm.core.events import (
    Event,
    ForeignUseObserved,
    GpusQuarantined,
    JobSubmitted,
    LaunchesObserved,
    NodeJoined,
    NodeLost,
    NodeTypesObserved,
    PolicyChanged,
)
from rm.core.launches import Wanted
from rm.core.model import Job, Node
from rm.core.policy import Policy
from rm.core.records import replace
from rm.core.scaleup import cuts, decide
from rm.core.state import ClusterState
from rm.errors import Busy, InternalError, LedgerUnavailable, RmError
from rm.ledger import Accepted, AppliedPolicy, Batch, EventRow, Ledger, Loaded
from rm.spec import JobSpec

log = logging.getLogger("rm.writer")

AT_ONCE = 500
"""Events of one caller, not submissions, that are one step: others have their turn in between."""
RETRY_S = 1.0
"""Pause after a failed commit before facts are tried again."""
ENDED_KEPT = 1_000
"""Ended jobs answered from memory; older ones are read from the ledger."""


@dataclass(slots=True, eq=False)
class _Request:
    """An event that somebody waits for: answered after the commit, or with its failure."""

    event: Event
    answer: asyncio.Future[None]
    accepted: Accepted | None = None
    policy: AppliedPolicy | None = None


@dataclass(slots=True)
class View:
    """What is committed. Readers get read-only mappings; the writer alone changes them, after each commit."""

    jobs: Mapping[str, Job] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    ended: Mapping[str, Job] = field(default_factory=dict)


class Writer:
    """Owns the `ClusterState`. All methods run in one event loop; `run` is its only long-lived task."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        clock: Callable[[], float],
        execute: Callable[[Iterable[Effect]], None],
        foresee: Callable[[Effect], Event | None] = lambda _: None,
        reconsider: Callable[[Mapping[str, Job]], None] = lambda _: None,
        want: Callable[[Wanted], None] = lambda _: None,
        max_pending: int = 100_000,
        max_pending_per_owner: int = 100_000,
        check: bool = False,
    ) -> None:
        """`foresee`: what an effect comes to, as an event, where that takes nothing that the world would notice.

        Such an event is part of the batch that decided the effect, and saves a commit of its own. If the batch can't
        be committed, `reconsider` is told the jobs as the ledger has them.
        """
        self._ledger = ledger
        self._clock = clock
        self._execute = execute
        self._foresee = foresee
        self._reconsider = reconsider
        self._want = want
        self._max_pending = max_pending
        self._max_pending_per_owner = max_pending_per_owner
        self._arriving: Counter[str] = Counter()
        """By owner, jobs in the inbox: those that `state.pending` does not count yet."""
        # Of its own: however many readers keep the common threads busy, a commit waits for none of them.
        self._committer = ThreadPoolExecutor(1, "rm-commit")
        self._check = check
        self._inbox: list[Event | _Request] = []
        self._wake = asyncio.Event()
        self._watchers: dict[str, set[asyncio.Future[None]]] = {}
        self._committed: dict[str, Job] = {}
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._nodes: dict[str, Node] = {}
        self._stopping = False
        self._scheduling = False
        self.broken: str | None = None
        """Why the ledger can't be written at present, or None."""
        self.policy = AppliedPolicy(Policy())
        """The rules in force, as committed."""
        self.state = ClusterState(self.policy.policy)
        self.recorded: dict[str, NodeJoined] = {}
        """The nodes that the ledger's history leaves in the cluster, by id: who joins it again is no news."""
        self._next_seq = 1

    # --- life --------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Load the ledger and resume what was under way. Called once, before `run`; raises LedgerUnavailable."""
        loaded = self._ledger.load()
        self._next_seq = loaded.next_seq
        effects = self._restore(loaded)
        self._committed = {job.id: job for job in loaded.jobs}
        self._execute(effects)

    async def run(self) -> None:
        """The loop. Returns after `stop` once the inbox is empty."""
        while not (self._stopping and not self._inbox):
            await self._wait()
            inbox, self._inbox = self._inbox, []
            self._arriving.clear()
            try:
                failed = await self._turn(inbox)
            except Exception as error:  # a bug of ours must not end the writer: nobody could release a GPU
                log.exception("a batch broke and is dropped: %s", inbox)
                self._answer_all(inbox, InternalError(f"the allocator hit a bug: {error!r}"))
                failed = True
            if failed:
                await self._start_over()

    def start_scheduling(self) -> None:
        """Called once the nodes have been observed: before that, nothing is known to be free or feasible."""
        self._scheduling = True
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    # --- asking and telling ------------------------------------------------------------------------------

    def post(self, event: Event) -> None:
        """A fact from the world. Never lost: it is tried until it is committed."""
        self._inbox.append(event)
        self._wake.set()

    async def request(self, event: Event) -> None:
        """An event whose sender waits until it is durable. Raises LedgerUnavailable if it could not be."""
        await self.request_all([event])

    async def request_all(self, events: Iterable[Event]) -> None:
        """Events whose sender waits until they are durable: all in one step, or in several where they are thousands."""
        loop = asyncio.get_running_loop()
        left = list(events)
        while left:
            some, left = left[:AT_ONCE], left[AT_ONCE:]
            await self._ask([_Request(event, loop.create_future()) for event in some])

    async def apply_policy(self, policy: Policy, text: str, by: str) -> None:
        """Put other rules in force. Durable, and followed by a cycle under them, when this returns."""
        now = self._clock()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        event = PolicyChanged(now, policy, by)
        await self._ask([_Request(event, answer, policy=AppliedPolicy(policy, text, by, now))])

    async def submit(
        self,
        drafts: list[tuple[JobSpec, str, Callable[[str, int], Job]]],
        spec_texts: Sequence[str] = (),
        named: Callable[[str, JobSpec, int], None] = lambda *_: None,
    ) -> list[str]:
        """Accept jobs, all or none; returns their ids once they are durable.

        A draft is the spec, its idempotency key, and what makes the core's record from an id and its number. For an
        array that makes many records, and the id is that of the array. Appends to the inbox before it first waits:
        what the caller has just seen in the state still holds then. `spec_texts`: the specs as the ledger stores them,
        where that is known. `named` is told each id before anything is decided about it, with the spec and the size of
        its text. Raises Busy where too many jobs would wait.
        """
        new: Counter[str] = Counter()
        for spec, _, _ in drafts:
            new[spec.owner] += spec.array or 1
        self._require_room(new)
        loop = asyncio.get_running_loop()
        now = self._clock()
        requests, ids = [], []
        for (spec, key, make), text in zip(drafts, spec_texts or repeat(""), strict=False):
            first = self._next_seq
            self._next_seq += spec.array or 1
            ids.append(f"j{first}")
            named(ids[-1], spec, len(text))
            for job, own_key in _records(make, first, spec.array, key):
                accepted = Accepted(job, spec, own_key, text)
                requests.append(_Request(JobSubmitted(now, job), loop.create_future(), accepted))
        self._arriving += new
        await self._ask(requests)
        return ids

    def _require_room(self, new: Mapping[str, int]) -> None:
        """Raises Busy where with these jobs, by owner, too many would wait."""
        for owner, count in new.items():
            waiting = self.state.pending.of_owner(owner) + self._arriving[owner]
            if waiting + count > self._max_pending_per_owner:
                raise Busy(
                    f"{waiting} jobs of {owner} are waiting, and with {count} more they would exceed the "
                    f"{self._max_pending_per_owner} that one owner may have; submit again when some have started, "
                    "cancel some, let one job do the work of many, or ask for a higher RM_MAX_PENDING_PER_OWNER"
                )
        waiting, count = len(self.state.pending) + self._arriving.total(), sum(new.values())
        if waiting + count > self._max_pending:
            raise Busy(
                f"{waiting} jobs are waiting, and with {count} more they would exceed the {self._max_pending} that "
                "the cluster holds; submit again when some have started, or ask for a higher RM_MAX_PENDING"
            )

    async def changed(self, job_id: str, timeout_s: float) -> None:
        """Return when a commit has changed the job, or a job of the array, or after `timeout_s`."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers.setdefault(job_id, set()).add(future)
        try:
            await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            pass
        finally:
            waiting = self._watchers.get(job_id, set())
            waiting.discard(future)
            if not waiting:
                self._watchers.pop(job_id, None)

    def view(self) -> View:
        return View(
            MappingProxyType(self._committed),
            MappingProxyType(self._nodes),
            MappingProxyType(self._ended),
        )

    # --- one turn ----------------------------------------------------------------------------------------

    async def _wait(self) -> None:
        if not self._inbox:
            now = self._clock()
            due = self.state.next_due(now)
            # Not `wait_for`: it takes a task, and turns of the loop, for what happens hundreds of times a second.
            alarm = due is not None and asyncio.get_running_loop().call_later(due - now, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                if alarm:
                    alarm.cancel()
        self._wake.clear()

    async def _turn(self, inbox: list[Event | _Request]) -> bool:
        """Apply, schedule, commit, act. True where the commit failed."""
        rows, effects, refused = self._decide(inbox)
        changed, usage = self.state.take_changes(), self.state.take_usage()
        cordons = self.state.take_cordons()
        policies = [
            each.policy
            for each in inbox
            if isinstance(each, _Request) and each.policy and each not in refused
        ]
        policy = policies[-1] if policies else None
        accepted = [
            each.accepted
            for each in inbox
            if isinstance(each, _Request) and each.accepted and each not in refused
        ]
        if rows or changed or usage or policy or cordons:
            batch = Batch(accepted, rows, changed, usage, policy, cordons)
            try:
                await asyncio.get_running_loop().run_in_executor(self._committer, self._ledger.commit, batch)
            except LedgerUnavailable as error:
                self.broken = str(error)
                log.error("commit failed, %d events wait: %s", len(inbox), error)  # noqa: TRY400
                self._answer_all(inbox, error)
                self._inbox[:0] = [each for each in inbox if not isinstance(each, _Request)]
                return True
        self.broken = None
        self.policy = policy or self.policy
        self._publish(changed)
        for each in inbox:
            if isinstance(each, _Request) and each not in refused and not each.answer.done():
                each.answer.set_result(None)
        self._execute(effects)
        self._want(self.state.launches.wanted)
        return False

    def _decide(self, inbox: list[Event | _Request]) -> tuple[list[EventRow], list[Effect], list[_Request]]:
        """Everything the core says about the inbox: pure in effect, no await."""
        rows: list[EventRow] = []
        effects: list[Effect] = []
        refused: list[_Request] = []
        now = self._clock()
        before = self.state.totals()
        # Submissions first: what they wait for is still as it was when they were checked.
        new = [each for each in inbox if isinstance(each, _Request) and each.accepted]
        told = [each for each in inbox if not (isinstance(each, _Request) and each.accepted)]
        for each in self._and_what_follows([*new, *told], now):
            event = each.event if isinstance(each, _Request) else each
            try:
                self._require_known(event)
                before = self._apply(event, before, rows, effects)
            except RmError as error:
                log.exception("an event was refused: %s", event)
                if isinstance(each, _Request):
                    each.answer.set_exception(error)
                    refused.append(each)
        if self._scheduling:
            for decision in decide(self.state, now).events:
                before = self._apply(decision, before, rows, effects)
        effects = self._foreseen(effects, before, rows)
        if self._check:
            self.state.check()
        return rows, effects, refused

    def _foreseen(self, effects: list[Effect], before: Totals, rows: list[EventRow]) -> list[Effect]:
        """What is left to be carried out when all has been applied that can be foreseen."""
        left: list[Effect] = []
        for effect in effects:
            event = self._foresee(effect)
            if event is None:
                left.append(effect)
            else:
                before = self._apply(event, before, rows, left)
        return left

    def _and_what_follows(self, inbox: list[Event | _Request], now: float) -> Iterator[Event | _Request]:
        """The inbox, and when all of it has been applied, what is due then."""
        yield from inbox
        yield from self.state.due(now)
        yield from cuts(self.state, now)

    def _require_known(self, event: Event) -> None:
        """A job must not wait for one that nobody will ever report: the state may have been read anew meanwhile."""
        if isinstance(event, JobSubmitted) and any(each not in self.state.jobs for each in event.job.after):
            raise Busy("the ledger was just read again, and jobs named in `after` have ended; submit again")

    def _apply(self, event: Event, before: Totals, rows: list[EventRow], effects: list[Effect]) -> Totals:
        version = self.state.version
        effects += self.state.apply(event)
        news = self._is_news(event)
        if self.state.version == version and not news:
            return before  # nothing happened, so nothing is recorded
        after = self.state.totals()
        if event.durable and news is not False:
            rows.append(EventRow(event, before, after))
        return after

    def _is_news(self, event: Event) -> bool | None:
        """Whether the ledger's history tells otherwise than the event of a node that came or went. None: ask the state.

        Each allocator observes all nodes anew, and finds those gone that went while none was there.
        """
        match event:
            case NodeJoined():
                known = self.recorded.get(event.node_id)
                if known is not None and replace(known, at=event.at) == event:
                    return False
                self.recorded[event.node_id] = event
                return True
            case NodeLost():
                if self.recorded.pop(event.node_id, None) is not None:
                    return True
        return None

    def _publish(self, changed: Iterable[Job]) -> None:
        self._nodes = dict(self.state.nodes)
        for job in changed:
            if job.status.terminal:
                self._committed.pop(job.id, None)
                self._ended[job.id] = job
                while len(self._ended) > ENDED_KEPT:
                    self._ended.popitem(last=False)
            else:
                self._committed[job.id] = job
            for name in filter(None, (job.id, job.array)):
                for future in self._watchers.pop(name, set()):
                    if not future.done():
                        future.set_result(None)

    async def _start_over(self) -> None:
        """Forget what was not committed: read the ledger again, as often as it takes, and go on from there.

        Effects under way are asked for again, since a commit that seemed to fail may have been made; they are
        idempotent. Requests that come meanwhile are refused: nothing could acknowledge them.
        """
        while True:
            await asyncio.sleep(RETRY_S)
            requests = [each for each in self._inbox if isinstance(each, _Request)]
            try:
                loaded, ended = await asyncio.to_thread(self._read_again)
            except LedgerUnavailable as error:
                self.broken = str(error)
                self._answer_all(requests, error)
                self._inbox = [each for each in self._inbox if not isinstance(each, _Request)]
                self._arriving.clear()
                continue
            break
        old = self.state
        effects = self._restore(loaded)
        for event in _observations(old, self._clock()):
            self.state.apply(event)
        self.state.idle_since |= {
            node_id: since for node_id, since in old.idle_since.items() if node_id in self.state.idle_since
        }
        self._publish([*loaded.jobs, *ended])
        self._reconsider(self.state.jobs)
        self._execute(effects)
        self._wake.set()

    def _restore(self, loaded: Loaded) -> list[Effect]:
        """A new state from the ledger; returns the effects that were under way."""
        self.policy = loaded.policy or AppliedPolicy(Policy())
        self.recorded = dict(loaded.nodes)
        self.state = ClusterState(self.policy.policy)
        return self.state.restore(loaded.jobs, loaded.usage, loaded.ended, loaded.cordons)

    def _read_again(self) -> tuple[Loaded, list[Job]]:
        """What lives by the ledger, and what has ended there without our having been told that it was committed."""
        loaded = self._ledger.load()
        live = {job.id for job in loaded.jobs}
        rows = [self._ledger.job(job_id) for job_id in self._committed.keys() - live]
        return loaded, [row.job for row in rows if row is not None]

    async def _ask(self, requests: list[_Request]) -> None:
        self._inbox.extend(requests)
        self._wake.set()
        if len(requests) == 1:
            await requests[0].answer
        else:
            await asyncio.gather(*(each.answer for each in requests))

    @staticmethod
    def _answer_all(inbox: Iterable[Event | _Request], error: Exception) -> None:
        for each in inbox:
            if isinstance(each, _Request) and not each.answer.done():
                each.answer.set_exception(error)


def _records(
    make: Callable[[str, int], Job], first: int, array: int | None, key: str
) -> Iterable[tuple[Job, str]]:
    """The records of one draft, each with its key: one, or those of an array."""
    if array is None:
        yield make(f"j{first}", first), key
        return
    for index in range(array):
        job = make(f"j{first}_{index}", first + index)
        own_key = f"{key}/{index}" if index else key
        yield replace(job, array=f"j{first}", array_index=index), own_key


def _observations(state: ClusterState, now: float) -> list[Event]:
    """What is known of the nodes, as the events that say it again."""
    launches = state.launches
    events: list[Event] = [
        NodeTypesObserved(now, tuple(launches.types.values()), launches.most_in_all, launches.awaited),
        LaunchesObserved(
            now,
            tuple(launches.up.items()),
            tuple(launches.booting.items()),
            launches.short,
            tuple(sorted(launches.returnable)),
        ),
    ]
    for node in state.nodes.values():
        events += [
            NodeJoined(
                now, node.id, node.name, node.gpu_slots, node.cpu_milli, node.memory_bytes, node.labels
            ),
            ForeignUseObserved(
                now,
                node.id,
                node.foreign_units - node.quarantined_units,
                node.foreign_cpu_milli,
                node.foreign_memory_bytes,
            ),
        ]
    events += [
        GpusQuarantined(each.at, each.node_id, each.units, each.strays) for each in state.quarantines.values()
    ]
    return events
