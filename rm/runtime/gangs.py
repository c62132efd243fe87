"""Carrying out the core's effects with Ray. One asyncio task per effect; each ends in exactly one event.

    Reserve ─► capacity seen free ─► group made ─► PlacementReady │ ReserveFailed
    Run     ─► runners in the group ─► user code ─► RunStarted … RunExited │ RunLost
    Stop    ─► hurries the Reserve or Run of the same attempt along
    Release ─► runners ended, group removed, removal seen ─► PlacementReleased

Where a run ends well its group and runners are kept for the next attempt of the kind (`stands`). PlacementReleased then
comes in the same breath as RunExited, and the Reserve that takes them over has nothing to wait for.

Every effect may be asked for again (after a restart, after a commit that seemed to fail): one that is under way
is left alone, one that is done finds its group and runners and says the same again.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ray.exceptions import RayError, RuntimeEnvSetupError
from ray.util.placement_group import PlacementGroup

from rm.core.effects import Effect, Release, Reserve, Run, Stop
from rm.core.events import (
    Event,
    GpuErrorsSeen,
    PlacementReady,
    PlacementReleased,
    ReserveFailed,
    RunExited,
    RunLost,
    RunStarted,
)
from rm.core.model import Job, Kind, Outcome, Status, attempt_key, units_by_node
from rm.core.resources import gpu_count
from rm.ledger import Ledger
from rm.runtime.log_ends import LogEnds
from rm.runtime.nodes import NodeGone, NodeWatch, Seen
from rm.runtime.orders import RunOrder, RunResult, Seat, archive_id
from rm.runtime.placements import Placements
from rm.runtime.requests import Requests
from rm.runtime.runners import Runners
from rm.runtime.stands import SETTLE_S, Stands, settled
from rm.spec import Config, JobSpec

log = logging.getLogger("rm.gangs")

STOP_SLACK_S = 15.0
"""Beyond the grace, how long a runner may take to report that its processes are gone before it is killed."""

SLOW_S = 1.0
"""After this long, a group whose GPUs were free is looked after, and then each time again."""
BRIEF_S = 0.15
"""A run that is shorter tells that it has started when it ends, which saves a call and a commit."""
STARTED_AGAIN_S = 1.0
UNSETTLED_KEPT = 2_000
"""Jobs that ended last of which it is remembered who has their logs: those before have long sent them."""

_Key = tuple[str, int]
Answer = TypeVar("Answer")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Gangs:
    """Executes effects; posts events. Runs in the writer's event loop."""

    def __init__(
        self,
        ledger: Ledger,
        requests: Requests,
        config: Config,
        placements: Placements,
        runners: Runners,
        stands: Stands,
        ends: LogEnds,
        watch: NodeWatch,
        post: Callable[[Event], None],
        clock: Callable[[], float],
        progress: Callable[[str, int, dict[str, Any]], None],
        slow: Callable[[], None],
    ) -> None:
        self._progress = progress
        self._slow = slow
        """Called while a group waits for longer than it should."""
        self._ledger = ledger
        self._requests = requests
        self._config = config
        self._placements = placements
        self._runners = runners
        self._stands = stands
        self._ends = ends
        self._watch = watch
        self._post = post
        self._clock = clock
        self._tasks: dict[tuple[type[Effect], _Key], asyncio.Task[None]] = {}
        self._stops: dict[_Key, _Stopping] = {}
        self._claims: dict[str, tuple[str, dict[str, int]]] = {}
        """Groups asked for and not yet seen: name → (group id once it has one, GPU units by node)."""
        self._kept: dict[str, RunExited] = {}
        """Attempts whose stand was kept when they ended, until that is committed."""
        self._unordered: set[_Key] = set()
        """Attempts whose group we have got and that we have not run yet: no runner can have an order of theirs."""
        self._unsettled: OrderedDict[str, tuple[str, list[Any], list[str]]] = OrderedDict()
        """By job, of its last attempt's end: the attempt, the runners, and the keys of what ran there."""

    def foresee(self, effect: Effect) -> Event | None:
        """PlacementReady for a Reserve for which all stands ready here. Nothing outside is touched."""
        if not isinstance(effect, Reserve):
            return None
        key, attempt = (effect.job_id, effect.attempt), attempt_key(effect.job_id, effect.attempt)
        stop, spec = self._stops.get(key), self._requests.at_hand(effect.job_id)
        if spec is None or (stop is not None and stop.asked.is_set()):
            return None
        nodes = {each.node_id for each in effect.placed}
        if self._gone(nodes, self._watch.seen) or not self._may_take(attempt, spec):
            return None
        if not self._stands.promise(attempt, effect.gang, effect.placed, spec.runtime_env):
            return None
        self._unordered.add(key)
        return PlacementReady(self._clock(), *key, self._placements.name(attempt))

    def reconsider(self, jobs: Mapping[str, Job]) -> None:
        """What was foreseen may never have been committed; these are the jobs that are."""
        self._stands.keep_promises(
            {attempt_key(job.id, job.attempt.number) for job in jobs.values() if job.attempt is not None}
        )

    def execute(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            key = effect.job_id, effect.attempt
            self._stands.kept(attempt_key(*key))
            match effect:
                case Reserve():
                    self._spawn(Reserve, key, self._reserve(effect))
                case Run():
                    self._spawn(Run, key, self._run(effect))
                case Release():
                    self._spawn(Release, key, self._release(effect))
                case Stop():
                    self._stopping(key).ask(effect.grace_s)

    def follows(self, job_id: str, attempt: int) -> bool:
        """Whether the attempt's run is under way, and nothing has stopped it or has ended a part of it."""
        key = job_id, attempt
        stop = self._stops.get(key)
        return (Run, key) in self._tasks and not (stop is not None and stop.asked.is_set())

    async def close(self) -> None:
        """Drop everything under way; groups and runners stay for the next allocator to adopt."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, kind: type[Effect], key: _Key, work: Coroutine[Any, Any, None]) -> None:
        slot = kind, key
        if slot in self._tasks:
            work.close()
            return
        task = self._tasks[slot] = asyncio.create_task(work, name=f"{kind.__name__} {key[0]}.{key[1]}")
        task.add_done_callback(lambda done: self._finished(slot, done))

    def _finished(self, slot: tuple[type[Effect], _Key], task: asyncio.Task[None]) -> None:
        self._tasks.pop(slot, None)
        if slot[0] is Release:
            self._stops.pop(slot[1], None)
            self._unordered.discard(slot[1])
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s broke", task.get_name(), exc_info=error)

    def _stopping(self, key: _Key) -> _Stopping:
        return self._stops.setdefault(key, _Stopping())

    # --- reserve -----------------------------------------------------------------------------------------

    async def _reserve(self, effect: Reserve) -> None:
        attempt = attempt_key(effect.job_id, effect.attempt)
        stop = self._stopping((effect.job_id, effect.attempt))
        blamed: list[str] = []
        making = asyncio.create_task(self._make_group(effect, attempt, blamed))
        stopped = asyncio.create_task(stop.asked.wait())
        await asyncio.wait([making, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not making.done():
            making.cancel()
        try:
            failure = await making
        except asyncio.CancelledError:
            failure = "stopped while its placement group was being made"
        except Exception as error:
            failure = f"Ray could not make the placement group: {error}"
        now = self._clock()
        if failure is None:
            name = self._placements.name(attempt)
            stand = name if name != attempt else ""
            self._unordered.add((effect.job_id, effect.attempt))
            self._post(PlacementReady(now, effect.job_id, effect.attempt, stand))
        else:
            self._claims.pop(attempt, None)
            node_id = blamed[0] if blamed else None
            self._post(ReserveFailed(now, effect.job_id, effect.attempt, failure, node_id))

    async def _make_group(self, effect: Reserve, attempt: str, blamed: list[str]) -> str | None:
        """Make the group when its capacity is visible. Returns what went wrong, or None.

        `blamed` gets the node whose fault it was: the only one, whose GPUs stayed free all the same.
        """
        timeout_s = self._config.reserve_timeout_s
        need = units_by_node(effect.placed, effect.gang.bundle.gpu_units)
        made = self._placements.group_id(attempt) is not None
        if not made and self._gone(need, self._watch.seen):
            return self._why_not(need)  # ids never come back
        if not made and await self._take_stand(effect, attempt):
            return None
        # Claimed before the wait, so that of two gangs that wait for the same GPUs one goes first.
        if not made:
            claimed = await self._watch.until(
                lambda seen: self._gone(need, seen) or self._claim(seen, attempt, need), timeout_s
            )
            if not claimed or self._gone(need, self._watch.seen):
                return self._why_not(need)
        group = await self._placements.create(attempt, effect.gang, effect.placed)
        if attempt in self._claims:
            self._claims[attempt] = (group.id.hex(), self._claims[attempt][1])
        if not await self._group_ready(attempt, need, timeout_s):
            if self._gone(need, self._watch.seen):
                return self._why_not(need)
            if len(need) == 1 and all(self._shows_free(*each) for each in need.items()):
                blamed += need
                return f"its placement group was not ready within {timeout_s:g} s though its GPUs are free"
            return f"its placement group was not ready within {timeout_s:g} s: the GPUs went to somebody else"
        return None

    async def _group_ready(self, attempt: str, need: Iterable[str], timeout_s: float) -> bool:
        """Whether the group is committed in time, and its nodes live.

        Ray makes none on a node that it takes away, and does not say so: where it takes long, somebody looks. A node
        that is found so is cordoned, which stops the attempt.
        """
        ready = asyncio.create_task(self._placements.ready(attempt, timeout_s))
        try:
            while not (await asyncio.wait([ready], timeout=SLOW_S))[0]:
                if self._gone(need, self._watch.seen):
                    return False
                self._slow()
        finally:
            if not ready.done():
                ready.cancel()
        return await ready

    async def _take_stand(self, effect: Reserve, attempt: str) -> bool:
        """Take over what another attempt has left in these places, if it has."""
        if not self._stands.may_take(effect.gang, effect.placed):
            return False
        (spec,) = await self._requests.of([effect.job_id])
        if not self._may_take(attempt, spec):
            return False
        return self._stands.take(attempt, effect.gang, effect.placed, spec.runtime_env)

    def _may_take(self, attempt: str, spec: JobSpec) -> bool:
        # A lease's holder brings his own actors: ours would take their place.
        return spec.kind is not Kind.LEASE and self._placements.group_id(attempt) is None

    @staticmethod
    def _gone(need: Iterable[str], seen: Seen) -> bool:
        return any(seen.gone(node_id) for node_id in need)

    def _shows_free(self, node_id: str, units: int) -> bool:
        node = self._watch.seen.nodes.get(node_id)
        return node is not None and node.free_gpu_units >= units

    def _claim(self, seen: Seen, attempt: str, need: dict[str, int]) -> bool:
        """Claim `need` if Ray shows it free beyond what is claimed by groups that Ray doesn't show yet."""
        self._drop_old_claims(seen)
        for node_id, units in need.items():
            node = seen.nodes.get(node_id)
            claimed = sum(by_node.get(node_id, 0) for _, by_node in self._claims.values())
            if node is None:
                return False
            if (missing := units + claimed - node.free_gpu_units) > 0:
                self._stands.make_room(node_id, missing)
                return False
        self._claims[attempt] = ("", need)
        return True

    def _drop_old_claims(self, seen: Seen) -> None:
        """Of groups that Ray shows, or that have been taken down, and on nodes that are gone."""
        for attempt, (group_id, by_node) in list(self._claims.items()):
            gone = all(seen.gone(node_id) for node_id in by_node)
            over = group_id and not self._placements.ours(group_id)
            if gone or over or (group_id and all(seen.holds(group_id, node_id) for node_id in by_node)):
                del self._claims[attempt]

    def _why_not(self, need: dict[str, int]) -> str:
        """What kept the planned capacity from showing up."""
        for node_id, units in need.items():
            node = self._watch.seen.nodes.get(node_id)
            if node is None:
                gone = self._watch.seen.gone(node_id)
                return f"node {node_id[:8]} " + ("is gone" if gone else "has not reported to Ray's GCS")
            if node.free_gpu_units < units:
                return (
                    f"Ray shows {gpu_count(node.free_gpu_units):g} free GPUs on {node.name} "
                    f"where {gpu_count(units):g} were planned: other work took them"
                )
        return "the planned GPUs are claimed by groups that Ray has not shown yet"

    # --- run ---------------------------------------------------------------------------------------------

    async def _run(self, effect: Run) -> None:
        key = effect.job_id, effect.attempt
        stop = self._stopping(key)
        if effect.kind is Kind.LEASE:
            self._post(RunStarted(self._clock(), *key))
            await stop.asked.wait()
            self._post(RunExited(self._clock(), *key, Outcome(Status.SUCCEEDED)))
            return
        if (ended := self._kept.get(attempt_key(*key))) is not None:
            self._post(ended)  # asked for again, because its end could not be committed
            self._post(PlacementReleased(ended.at, *key))
            return
        run = _GangRun(self, effect, stop, ordered=key not in self._unordered)
        self._unordered.discard(key)
        event: RunExited | RunLost
        try:
            event = await run.to_the_end()
        except asyncio.CancelledError:
            raise
        except RuntimeEnvSetupError as error:
            failure = Outcome(Status.FAILED, f"runtime_env could not be set up: {_last_words(error)}")
            event = RunExited(self._clock(), *key, failure)
        except RayError as error:
            event = RunLost(self._clock(), *key, f"a runner was lost: {_last_words(error)}", run.failed_on)
        except NeverHeardOf as error:
            # Nobody's fault, as when the group can't be had: it costs no retry.
            event = RunExited(self._clock(), *key, Outcome(Status.QUEUED, str(error)))
        except (RunnerGone, NodeGone) as error:
            event = RunLost(self._clock(), *key, str(error), error.node_id)
        except TimeoutError as error:
            event = RunLost(self._clock(), *key, str(error), run.silent_on())
        except Exception as error:
            log.exception("the run of %s.%d broke", *key)
            event = RunLost(self._clock(), *key, f"the run could not be followed: {error!r}")
        kept = isinstance(event, RunExited) and run.keep_stand()
        self._post(event)
        if kept:
            assert isinstance(event, RunExited)
            self._kept[attempt_key(*key)] = event
            self._post(PlacementReleased(event.at, *key))

    # --- release -----------------------------------------------------------------------------------------

    async def _release(self, effect: Release) -> None:
        attempt = attempt_key(effect.job_id, effect.attempt)
        # A lease whose node died still waits for its stop.
        self._stopping((effect.job_id, effect.attempt)).ask(0)
        if self._kept.pop(attempt, None) is None:
            ended, runners, _ = self._unsettled.get(effect.job_id, ("", [], []))
            node_ids = {each.node_id for each in effect.placed}
            count = effect.gang.count
            await self._stands.take_down(attempt, node_ids, count, runners if ended == attempt else ())
        self._post(PlacementReleased(self._clock(), effect.job_id, effect.attempt))

    # --- what is left when a run has ended ------------------------------------------------------------------

    def has_ended(self, job_id: str, attempt: str, runners: list[Any], keys: list[str]) -> None:
        """The runners have told how it ended, and may be sending the ends of its logs yet."""
        self._unsettled[job_id] = attempt, runners, keys
        self._unsettled.move_to_end(job_id)
        while len(self._unsettled) > UNSETTLED_KEPT:
            self._unsettled.popitem(last=False)

    async def settled(self, job_id: str) -> None:
        """Returns when the logs of the job's last attempt that has ended are whole, or can't become so any more."""
        ended, deadline = self._unsettled.get(job_id), time.monotonic() + SETTLE_S
        if ended is not None:
            _, runners, keys = ended
            await settled(runner.settled.remote(key) for runner, key in zip(runners, keys, strict=True))
            if self._unsettled.get(job_id) is ended:
                del self._unsettled[job_id]
        # If the runners were ended before they could send it.
        await self._ends.delivered(deadline - time.monotonic(), archive_id(self._ledger.key, job_id))


class RunnerGone(Exception):
    """A runner that was there is no more."""

    def __init__(self, node_id: str) -> None:
        super().__init__("a runner died while there was no allocator")
        self.node_id = node_id


class NeverHeardOf(Exception):
    """A runner of an attempt that was starting is not there, and nobody knows whether it ever was."""

    def __init__(self) -> None:
        super().__init__(
            "the allocator was restarted while its runners started, and not all of them are there: "
            "whether its code has begun can't be told"
        )


class _Stopping:
    """The wish to stop one attempt, and how long its processes may take."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.grace_s = 0.0

    def ask(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.asked.set()


class _GangRun:
    """One Run effect: its runners from their start to the last process's end."""

    def __init__(self, gangs: Gangs, effect: Run, stop: _Stopping, *, ordered: bool) -> None:
        self._gangs = gangs
        self._effect = effect
        self._stop = stop
        self._ordered = ordered
        """Whether runners of this very attempt may have their orders already: it was asked for before."""
        self._attempt = attempt_key(effect.job_id, effect.attempt)
        self._handles: list[Any] = []
        self._seated: set[int] = set()
        self._told_started = False
        self._clean = False
        """Whether it has ended and left nothing behind on any node."""
        self._runtime_env: dict[str, Any] = {}
        self._free_seats: list[Seat] = []
        self.failed_on: str | None = None
        """The node of the first runner that was lost."""

    def silent_on(self) -> str | None:
        """The node of the first runner that has not said where it sits."""
        silent = (bundle for bundle in range(len(self._handles)) if bundle not in self._seated)
        return next((self._effect.placed[bundle].node_id for bundle in silent), None)

    async def _asked(self, bundle: int, answer: Awaitable[Answer]) -> Answer:
        """What the bundle's runner answers. Where it is lost instead, its node is remembered."""
        try:
            return await answer
        except RuntimeEnvSetupError:
            raise
        except RayError:
            self.failed_on = self.failed_on or self._effect.placed[bundle].node_id
            raise

    async def _seat(self, bundle: int) -> Seat:
        seat: Seat = await self._asked(bundle, self._handles[bundle].seat.remote())
        self._seated.add(bundle)
        return seat

    async def _all_seats(self) -> list[Seat]:
        return list(await asyncio.gather(*(self._seat(bundle) for bundle in range(len(self._handles)))))

    async def to_the_end(self) -> RunExited | RunLost:
        gangs, effect = self._gangs, self._effect
        clock = gangs._clock
        try:
            (spec,) = await gangs._requests.of([effect.job_id])
        except KeyError:
            return RunLost(clock(), effect.job_id, effect.attempt, "the ledger has lost the job")
        self._runtime_env = spec.runtime_env
        group = gangs._placements.handle(self._attempt)
        if group is None:
            return RunLost(clock(), effect.job_id, effect.attempt, "its placement group is gone")
        seats = await self._seats(group)
        if seats is None:
            stopped = Outcome(Status.CANCELLED, "stopped while its runners started")
            return RunExited(clock(), effect.job_id, effect.attempt, stopped)
        if problem := _python_problem(spec, seats):
            failure = Outcome(Status.FAILED, problem)
            return RunExited(clock(), effect.job_id, effect.attempt, failure)
        orders = self._orders(spec, seats)
        results = await self._follow(orders, seats)
        if results[0].progress:
            gangs._progress(effect.job_id, effect.attempt, results[0].progress)
        for seat, each in zip(seats, results, strict=True):
            if broken := [xid for xid in each.xids if xid.broken]:
                why = f"{'; '.join(map(str, broken))}, under {self._attempt}"
                gangs._post(GpuErrorsSeen(clock(), seat.node_id, why))
        outcome = _outcome(results, seats, orders)
        self._clean = all(each.clean for each in results)
        self._free_seats = [replace(seat, port=each.port) for seat, each in zip(seats, results, strict=True)]
        return RunExited(clock(), effect.job_id, effect.attempt, outcome)

    def keep_stand(self) -> bool:
        """The run has ended: keep its group and runners for the next, if nothing of it is left there."""
        return self._clean and self._gangs._stands.keep(
            self._attempt,
            self._effect.gang,
            self._effect.placed,
            self._runtime_env,
            self._handles,
            self._free_seats,
        )

    async def _seats(self, group: PlacementGroup) -> list[Seat] | None:
        """The runners' seats, or None when a stop comes first. They are taken over, found, or started."""
        stand = self._gangs._stands.taken(self._attempt)
        if stand is not None:
            self._handles = stand.runners
            return None if self._stop.asked.is_set() else stand.seats
        name = self._gangs._placements.name(self._attempt)
        runners, gang = self._gangs._runners, self._effect.gang
        if self._ordered or self._effect.begun:
            # Taken over from another allocator, mostly. A runner that died meanwhile is not made anew, for code would
            # run twice under one attempt, with one log and one scratch directory; and even at once, where the keeper
            # of the dead one has not had its turn. Of one that is starting, RunStarted alone would have told whether
            # its code has begun: so what holds for RUNNING holds for STARTING.
            found = await runners.find(name, gang.count)
            if None in found:
                if not self._effect.begun:
                    raise NeverHeardOf
                raise RunnerGone(self._effect.placed[found.index(None)].node_id)
            self._handles = found
        else:
            self._handles = await runners.start(name, gang, group, self._runtime_env)
        return await self._unless_stopped(asyncio.ensure_future(self._all_seats()))

    async def _unless_stopped(self, work: asyncio.Future[list[Seat]]) -> list[Seat] | None:
        """The result of `work`, or None when a stop comes first.

        Raises TimeoutError past `start_timeout_s`, NodeGone where one of its nodes dies meanwhile.
        """
        watch, nodes = self._gangs._watch, {each.node_id for each in self._effect.placed}
        timeout_s = self._gangs._config.start_timeout_s
        # Who has an order is told to stop, and has its grace.
        stopped = asyncio.ensure_future(asyncio.Future() if self._ordered else self._stop.asked.wait())
        gone = asyncio.ensure_future(watch.lost(nodes))
        both: list[asyncio.Future[Any]] = [work, stopped, gone]
        try:
            await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if stopped.done():
                return None
            if gone.done():
                raise NodeGone(gone.result())
            raise TimeoutError(f"runners did not start within {timeout_s:g} s")
        finally:
            for each in both:
                each.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _follow(self, orders: list[RunOrder], seats: list[Seat]) -> list[RunResult]:
        """Start every bundle, say when all run, and stop the whole gang when one fails or a stop is asked."""
        runs = [
            asyncio.ensure_future(self._asked(bundle, handle.run.remote(order)))
            for bundle, (handle, order) in enumerate(zip(self._handles, orders, strict=True))
        ]
        keys = [order.key for order in orders]
        told = asyncio.create_task(self._tell_started(keys, seats))
        stopper = asyncio.create_task(self._stop_when_asked(keys, runs))
        try:
            pending = set(runs)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                failed = any(each.exception() is not None or not each.result().ok for each in done)
                if failed and pending:
                    self._stop.ask(self._effect.grace_s)
            # Also where one was lost: the others may be sending their logs yet, and have their files to remove.
            self._gangs.has_ended(self._effect.job_id, self._attempt, self._handles, keys)
            results = [each.result() for each in runs]
            if all(each.began for each in results):
                self._post_started(seats)
            return results
        finally:
            for task in (told, stopper):
                task.cancel()
            await asyncio.gather(told, stopper, return_exceptions=True)

    async def _tell_started(self, keys: list[str], seats: list[Seat]) -> None:
        await asyncio.sleep(BRIEF_S)
        asked_before = False
        while True:
            calls = [handle.started.remote(key) for handle, key in zip(self._handles, keys, strict=True)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            failed = next((each for each in answers if isinstance(each, BaseException)), None)
            if failed is None:
                self._post_started(seats)
                return
            # A runner that is lost ends the run, and this with it. One that only could not be reached for a moment
            # has to be asked again: nobody else would ever say that the job runs.
            if not asked_before:
                log.warning("%s: a runner does not say whether it has started: %s", self._attempt, failed)
            asked_before = True
            await asyncio.sleep(STARTED_AGAIN_S)

    def _post_started(self, seats: list[Seat]) -> None:
        if self._told_started:
            return
        self._told_started = True
        hosts = tuple(self._node_name(seat) for seat in seats)
        gpus = tuple(seat.gpu_ids for seat in seats)
        gangs, effect = self._gangs, self._effect
        gangs._post(RunStarted(gangs._clock(), effect.job_id, effect.attempt, hosts, gpus))

    def _node_name(self, seat: Seat) -> str:
        """The node as listings name it."""
        node = self._gangs._watch.seen.nodes.get(seat.node_id)
        return node.name if node else seat.address

    async def _stop_when_asked(self, keys: list[str], runs: Sequence[asyncio.Future[RunResult]]) -> None:
        await self._stop.asked.wait()
        grace_s = self._stop.grace_s
        calls = [handle.stop.remote(key, grace_s) for handle, key in zip(self._handles, keys, strict=True)]
        await asyncio.gather(*calls, return_exceptions=True)
        _, silent = await asyncio.wait(runs, timeout=grace_s + STOP_SLACK_S)
        if silent:
            log.warning("%s does not stop; its runners are killed", self._attempt)
            name = self._gangs._placements.name(self._attempt)
            await self._gangs._runners.kill(name, self._effect.gang.count)

    def _orders(self, spec: JobSpec, seats: list[Seat]) -> list[RunOrder]:
        effect, gangs = self._effect, self._gangs
        local = spec.processes_per_bundle(effect.gang.bundle.gpu_units)
        alone = len(seats) == 1
        return [
            RunOrder(
                job_id=effect.job_id,
                attempt=effect.attempt,
                ledger_key=gangs._ledger.key,
                node_name=self._node_name(seats[bundle]),
                bundle=bundle,
                bundles=len(seats),
                first_rank=bundle * local,
                local_world=local,
                world=local * len(seats),
                master_address="127.0.0.1" if alone else seats[0].address,
                master_port=seats[0].port,
                kind=effect.kind,
                command=spec.command,
                payload_sha256=spec.payload_sha256,
                working_dir_sha256=spec.working_dir_sha256,
                cwd=spec.cwd,
                env=spec.env,
                python=spec.python,
                cpus=effect.gang.bundle.cpu_milli / 1000,
                checkpoint_dir=f"{gangs._config.checkpoint_root}/{gangs._ledger.key}/{effect.job_id}",
                grace_s=effect.grace_s,
                array_index=effect.array_index,
                array_size=spec.array,
            )
            for bundle in range(len(seats))
        ]


def _outcome(results: list[RunResult], seats: list[Seat], orders: list[RunOrder]) -> Outcome:
    """The gang's end: success, or the rank that failed first."""
    failed = [(each, seat) for each, seat in zip(results, seats, strict=True) if not each.ok]
    if not failed:
        # Told to stop, a program may well save its work and exit with 0: that is not the end of its work.
        if any(each.stopped for each in results):
            return Outcome(Status.CANCELLED, "ended when it was told to stop", exit_code=0)
        return Outcome(Status.SUCCEEDED)
    # A rank that was told to stop is a consequence; the cause is the earliest that was not, or rather that of which the
    # driver says why: where a GPU breaks, ranks on others can be the first to give up on it.
    first, seat = min(failed, key=lambda each: _as_cause(each[0]))
    message = first.message
    if first.lost:
        return Outcome(Status.FAILED, message, node_id=seat.node_id, tail=first.tail, infra=True)
    if orders[0].world > 1 and "rank" not in message:
        message = f"rank {first.rank}: {message}"
    return Outcome(
        Status.FAILED,
        message,
        rank=first.rank,
        node_id=seat.node_id,
        exit_code=first.exit_code,
        signal=first.signal,
        tail=first.tail,
    )


def _as_cause(result: RunResult) -> tuple[bool, bool, float]:
    """Where a failed bundle stands among those that may have brought down the gang: the least one did."""
    explained = any(each.infra for each in result.xids)
    return not explained, result.stopped and result.failed_at > 0, result.failed_at


def _python_problem(spec: JobSpec, seats: list[Seat]) -> str | None:
    """Functions by value need the same Python on both sides: its byte code travels."""
    if spec.kind is not Kind.FUNCTION or not spec.python:
        return None
    for seat in seats:
        if seat.python != spec.python:
            return (
                f"the function was pickled by Python {spec.python}, node {seat.address} has {seat.python}; "
                "submit from the same version, or submit a command"
            )
    return None


def _last_words(error: BaseException) -> str:
    plain = _COLOUR.sub("", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return " | ".join(lines[:1] + lines[-3:] if len(lines) > 4 else lines) or type(error).__name__
