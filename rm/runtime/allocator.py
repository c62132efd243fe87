"""The allocator of record: a detached actor that owns the writer, the ledger and everything that acts.

Restarted by Ray whenever it dies (`max_restarts=-1`), it comes back by reading the ledger, then Ray's own tables,
and only then schedules. Its methods are thin: they validate, hand an event to the writer, or read what is
committed. No method waits for another process in the writer's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shlex
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from typing import Any

import ray

import rm
from rm import rights
from rm.core.cycle import why_each
from rm.core.events import (
    CheckpointReported,
    GpusQuarantined,
    HoldChanged,
    NodeCordoned,
    NodeUncordoned,
    StopRequested,
)
from rm.core.forecast import Twin
from rm.core.launches import Wanted
from rm.core.model import TERMINAL, Cordon, Job, Kind, Node, Status, StopCause, attempt_key
from rm.core.policy import Policy
from rm.core.reasons import Reason
from rm.core.resources import Devices
from rm.errors import (
    AllocatorUnavailable,
    InvalidSpec,
    LeaseLost,
    LedgerUnavailable,
    RequestError,
    UnknownJob,
)
from rm.ledger import Ledger
from rm.runtime.asks import Asks
from rm.runtime.audit import Audit
from rm.runtime.autoscaler import Autoscaler
from rm.runtime.clock import Anchor, Clock, boot_id
from rm.runtime.drafts import Dependencies, Drafting, requested
from rm.runtime.gangs import Gangs
from rm.runtime.group_removal import all_of
from rm.runtime.holders import Holders
from rm.runtime.keys import Keys
from rm.runtime.links import Link
from rm.runtime.log_ends import LogEnds
from rm.runtime.node_names import named
from rm.runtime.nodes import NodeWatch
from rm.runtime.old_world import OldWorld
from rm.runtime.orders import archive_id
from rm.runtime.placements import Placements, bundle_resources
from rm.runtime.requests import Requests
from rm.runtime.runners import Runners
from rm.runtime.stands import SETTLE_S, Stands
from rm.runtime.stays import Stays
from rm.runtime.wardens import Wardens
from rm.runtime.writer import Writer
from rm.settings import Settings
from rm.settings_change import consequences
from rm.spec import MAX_ARRAY, Config, JobSpec
from rm.store import Tidied
from rm.views import (
    AuditView,
    EventView,
    JobView,
    NodeView,
    QueueView,
    array_status,
    array_view,
    booting_node_view,
    gone_node_view,
    job_view,
    node_view,
    queue_views,
    reason_dict,
)

log = logging.getLogger("rm.allocator")

HOLDERS_LOOK_S = 1.0
THREADS = 256
"""Most threads for calls that block: made when needed. More than there are gangs that start or end at one moment."""
TIDY_S = 600.0
"""Between two times at which the store is rid of what is too old or too much."""
LONGEST_WAIT_S = 30.0
"""Longest that one `wait` call lasts; the client asks again. Short enough to survive proxies and restarts."""
MOST_WAITS = 500
"""Calls of `wait` that are held at a time, half of what the actor takes. Others are answered at once: clients pause."""
BULK = 200
"""Submissions with more jobs than this take turns."""
MOST_LISTED = 10_000
MOST_EVENTS = 100_000
FRESH_REASONS = 200
"""Listed jobs whose reasons are worked out anew; further ones show what was recorded."""
VIEWS_A_SLICE = 250
"""Views that are made without letting others have their turn."""
MOST_FORECASTS = 8
"""Estimates that are under way or wait for their turn; who asks beyond that is told so."""
FEW = 8
PROGRESS_KEPT = 2_000
"""Jobs whose latest report is at hand."""
SAME_CHECKPOINT_S = 0.05
FIRST_TURN_S = 5.0
"""How long the first answer waits for the writer's first commit."""
ARRAY_LOOK_S = 1.0
"""How long at most an array is not counted anew for somebody who waits for it."""
ARRAY_PAUSE_S = 0.05
"""Between two counts: thousands of jobs may end in a second."""


class Allocator:
    """The actor's class, one per cluster, named "allocator" in namespace "rm"."""

    def __init__(self, config: Config) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        # A hundred thousand records live long: to look through all of them for garbage at Python's usual pace would
        # take a third of the time that a flood of submissions needs.
        gc.set_threshold(50_000, 20, 50)
        self._config = config
        self._ready = asyncio.Event()
        self._broken: Exception | None = None
        self._closing = False
        self._last_progress: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._holders = Holders()
        self._store = Link("store")
        self._submitting: dict[str, asyncio.Lock] = {}
        self._drafting: Drafting | None = None
        self._bulk = asyncio.Lock()
        self._listing = asyncio.Semaphore(2)
        self._waits = 0
        self._forecasts = 0
        self._estimating = asyncio.Lock()
        self._forecaster = ThreadPoolExecutor(1, "rm-forecast")
        self._tasks: list[asyncio.Task[None]] = []
        # The constructor must return before the actor's event loop runs: the first call is our own.
        ray.get_runtime_context().current_actor.live.remote()

    @ray.method(max_task_retries=0)  # type: ignore[untyped-decorator]
    async def live(self) -> None:
        """Recover, then run until `shutdown`. Called by the constructor alone."""
        try:
            await self._recover()
        except Exception as error:
            log.exception("the allocator can't start")
            self._broken = error
            self._ready.set()
            return
        self._ready.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _recover(self) -> None:
        config = self._config
        # Calls to Ray wait as long as its GCS is away, one thread each. The ledger must not have to wait behind them.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "rm"))
        self._ledger = await asyncio.to_thread(Ledger.open, config.ledger_url)
        # Ray starts a crashed actor again under the same id; a new allocator has another.
        life = f"{ray.get_runtime_context().get_actor_id()} {boot_id()}"
        anchor = Anchor(config.home / "clock.json", life)
        self._requests = Requests(self._ledger)
        self._keys = Keys(self._ledger)
        self._clock = Clock(await asyncio.to_thread(self._ledger.newest), anchor)
        self._began = self._clock()
        self._placements = Placements(self._ledger.key)
        runners = Runners(self._ledger.key)
        self._wardens = Wardens(self._ledger.key)
        self._watch = NodeWatch(
            lambda event: self._writer.post(event),
            lambda group_id: self._placements.ours(group_id) or self._asks.ours(group_id),
            clock=self._clock,
            poll_s=config.node_poll_s,
            kept=self._wardens.units,
        )
        ends = self._ends = LogEnds(self._store)
        self._stands = Stands(self._placements, runners, self._watch, ends, config.keep_warm_s)
        self._autoscaler = Autoscaler(
            lambda event: self._writer.post(event),
            clock=self._clock,
            busy=lambda: self._asks.busy,
            config_file=config.autoscaling_config,
        )
        self._asks = Asks(
            self._ledger.key,
            seen=lambda: self._watch.seen,
            known=lambda: self._writer.view().nodes.keys(),
            types=lambda: self._autoscaler.types,
        )
        self._stays = Stays(self._ledger.key, seen=lambda: self._watch.seen)
        self._gangs = Gangs(
            self._ledger,
            self._requests,
            config,
            self._placements,
            runners,
            self._stands,
            ends,
            self._watch,
            lambda event: self._writer.post(event),
            self._clock,
            self._keep_progress,
            self._autoscaler.hurry,
        )
        self._writer = Writer(
            self._ledger,
            clock=self._clock,
            execute=OldWorld(
                self._ledger.key, self._gangs.execute, self._watch, lambda: self._writer.recorded
            ).execute,
            foresee=self._gangs.foresee,
            reconsider=self._gangs.reconsider,
            want=self._want,
            max_pending=config.max_pending,
            max_pending_per_owner=config.max_pending_per_owner,
            check=bool(os.environ.get("RM_CHECK")),
        )
        self._audit = Audit(
            self._ledger.key,
            self._placements,
            runners,
            self._stands,
            self._gangs,
            self._wardens,
            self._stays,
            view=self._writer.view,
            request=self._writer.request,
            clock=self._clock,
            node_poll_s=config.node_poll_s,
            every_s=config.audit_every_s,
        )
        # Observe first: what groups exist decides what is ours, and what is free.
        await self._placements.find()
        await self._wardens.find()
        self._writer.recover()
        for job in self._writer.state.jobs.values():
            if job.attempt and job.attempt.stand:
                self._placements.hand_over(job.attempt.stand, attempt_key(job.id, job.attempt.number))
        await self._remove_orphans(runners)
        await self._watch.first(self._writer.recorded)
        for node_id in self._wardens.nodes():
            # The first audit tells why.
            self._writer.post(GpusQuarantined(self._clock(), node_id, self._wardens.units(node_id)))
        with contextlib.suppress(Exception):
            await self._autoscaler.look()
        for job in self._writer.state.jobs.values():
            if job.ttl_s is not None:
                self._holders.add(job.array or job.id, job.ttl_s)
        self._writer.start_scheduling()
        self._tasks = [
            asyncio.create_task(self._writer.run()),
            asyncio.create_task(self._watch.run()),
            asyncio.create_task(self._listen_for_holders()),
            asyncio.create_task(self._keep_tidy()),
            asyncio.create_task(self._autoscaler.run()),
            asyncio.create_task(self._asks.run()),
            asyncio.create_task(self._stays.run()),
            asyncio.create_task(self._audit.run()),
        ]
        # Who asks right after the start must not hear that there are no nodes.
        deadline = time.monotonic() + FIRST_TURN_S
        while len(self._writer.view().nodes) < len(self._watch.seen.nodes) and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    def _want(self, wanted: Wanted) -> None:
        busy = self._asks.busy
        self._asks.want(wanted)
        self._stays.want(wanted.stay)
        if self._asks.busy and not busy:
            self._autoscaler.hurry()

    async def _remove_orphans(self, runners: Runners) -> None:
        """Groups of ours whose attempt the ledger doesn't know as live: nobody would ever release them."""
        live = {
            attempt_key(job.id, job.attempt.number) for job in self._writer.state.jobs.values() if job.attempt
        }

        async def remove(attempt: str) -> None:
            log.warning("removing the group of %s: the ledger knows no such live attempt", attempt)
            handle = self._placements.handle(attempt)
            bundles = len(handle.bundle_specs) if handle else 1
            await runners.kill(attempt, bundles)
            await self._placements.remove(attempt)

        await all_of(map(remove, self._placements.attempts() - live))

    async def _listen_for_holders(self) -> None:
        while True:
            await asyncio.sleep(HOLDERS_LOOK_S)
            for held in self._holders.silent():
                for job_id in self._live_members(held) or [held]:
                    self._writer.post(StopRequested(self._clock(), job_id, StopCause.HOLDER_LOST))

    async def _keep_tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_S)
            try:
                await self.tidy()
            except Exception:
                log.warning("the store was not tidied; the next time is in %g s", TIDY_S, exc_info=True)

    async def tidy(self) -> Tidied:
        """Remove from the store what is too old or too much (RM_STORE_KEEP_DAYS, RM_STORE_KEEP_BYTES)."""
        await self._up()
        # First the time: whatever is submitted from now on touches its blobs later.
        now, key = self._clock(), self._ledger.key
        live = {archive_id(key, job_id) for job_id in self._writer.view().jobs}
        needed = await asyncio.to_thread(self._ledger.blobs_of_live_jobs)
        keep_s = self._config.store_keep_days * 86_400
        tidied: Tidied = await self._store.call(
            "tidy", live, needed, now, keep_s, self._config.store_keep_bytes
        )
        if tidied.jobs or tidied.blobs:
            log.info(
                "the store was rid of logs and results of %d jobs and of %d blobs, %d MiB; %d MiB are left",
                tidied.jobs,
                tidied.blobs,
                tidied.freed_bytes >> 20,
                tidied.kept_bytes >> 20,
            )
        if tidied.kept_bytes > self._config.store_keep_bytes:
            log.warning(
                "the store takes %d MiB, more than RM_STORE_KEEP_BYTES: all of it is needed by live jobs, or is new",
                tidied.kept_bytes >> 20,
            )
        return tidied

    # --- asked by clients ----------------------------------------------------------------------------------

    async def hello(self) -> dict[str, Any]:
        """Who answers: version, life, ledger, pid, since when, and what it lets the store keep."""
        await self._up()
        return {
            "version": rm.__version__,
            "life": self._keys.life,
            "ledger_key": self._ledger.key,
            "ledger_url": _without_password(self._config.ledger_url),
            "home": str(self._config.home),
            "store_keep_days": self._config.store_keep_days,
            "store_keep_bytes": self._config.store_keep_bytes,
            "pid": os.getpid(),
            "began": self._began,
            "broken": self._writer.broken,
            "live_jobs": len(self._writer.view().jobs),
        }

    async def submit(self, submission: tuple[list[str], list[str], str]) -> list[str]:
        """Accept requests, all or none. Durable when this returns; a key seen before gives its first job's id.

        `submission`: the requests as `encode_spec` gives them, a key for each, and the life of the allocator, as told
        by `hello`, for which they were drawn. Raises what is wrong with a request.
        """
        texts, keys, life = submission  # one argument, because Ray makes a step of each
        await self._up()
        if self._closing:
            raise AllocatorUnavailable("the allocator is stopping; start it again with `rmctl start`")
        if len(set(keys)) != len(keys):
            raise InvalidSpec("keys: each job of one submission needs a key of its own", field="keys")
        # A thread takes longer to hand over to than a few requests to read.
        specs = requested(texts) if len(texts) <= FEW else await asyncio.to_thread(requested, texts)
        # Here and not in the spec: what stands in a ledger stays readable.
        for owner in {spec.owner for spec in specs}:
            rights.require_name(owner)
        count = sum(spec.array or 1 for spec in specs)
        if count > MAX_ARRAY:
            raise InvalidSpec(
                f"entries: {count} jobs in one step, and at most {MAX_ARRAY} can be; submit them in parts",
                field="entries",
            )
        if count <= BULK:
            ids = await self._submit(specs, keys, texts, life)
        else:
            # One large batch at a time, and of one owner only one in the queue: nobody waits for more than one of each.
            async with self._one_at_a_time(f"bulk of {specs[0].owner}"), self._bulk:
                ids = await self._submit(specs, keys, texts, life)
        for spec, job_id in zip(specs, ids, strict=True):
            if spec.ttl_s is not None:
                self._holders.add(job_id, spec.ttl_s)
        return ids

    async def _submit(self, specs: list[JobSpec], keys: list[str], texts: list[str], life: str) -> list[str]:
        # A call that is made again while the first is under way waits for it: its keys are then known.
        async with self._one_at_a_time(keys[0] if keys else ""):
            known = await self._keys.known(specs, keys, life)
            each = zip(specs, keys, texts, strict=True)
            new = [(spec, key, text) for spec, key, text in each if key not in known]
            waits = Dependencies(self._writer, self._ledger)
            await waits.settle(name for spec, _, _ in new for name in spec.after)
            # From here to the writer's inbox nothing is waited for: what was settled stays so.
            drafting, now = self._drafting_now(), self._clock()
            drafts = [(spec, key, drafting.draft(spec, waits.left(spec.after), now)) for spec, key, _ in new]
            new_texts = [text for _, _, text in new]
            try:
                accepted = await self._writer.submit(drafts, new_texts, self._requests.keep) if drafts else []
            except LedgerUnavailable:
                # Committed after all, or by a first call that is forgotten here: the ledger holds a key only once.
                known = await self._keys.stored(specs, keys)
                if len(known) < len(keys):
                    raise
            else:
                known |= {key: job_id for (_, key, _), job_id in zip(new, accepted, strict=True)}
            ids = [known[key] for key in keys]
            self._keys.accepted(keys, ids)
        return ids

    def _drafting_now(self) -> Drafting:
        """By the rules and the nodes as they are."""
        state = self._writer.state
        rules = state.policy, state.node_shapes()
        awaited = state.launches.awaited
        if self._drafting is None or not self._drafting.serves(*rules, awaited=awaited):
            self._drafting = Drafting(*rules, awaited=awaited)
        return self._drafting

    @contextlib.asynccontextmanager
    async def _one_at_a_time(self, whose: str) -> AsyncIterator[None]:
        """Let calls with the same first key, or of the same owner, pass one after the other."""
        lock = self._submitting.setdefault(whose, asyncio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._submitting.pop(whose, None)

    async def job(self, job_id: str) -> JobView:
        """One job, live or ended, or an array of jobs as one. Raises UnknownJob."""
        await self._up()
        return await self._look(job_id)

    async def array(self, array_id: str) -> list[JobView]:
        """The jobs of an array, by index. Raises UnknownJob."""
        await self._up()
        rows = await asyncio.to_thread(self._ledger.members, array_id)
        if not rows:
            await self._find(array_id)
            raise UnknownJob(f"{array_id} is one job and no array", job=array_id)
        return await self._views([row.job for row in rows], [row.spec for row in rows])

    async def jobs(
        self, *, live_only: bool = True, owner: str | None = None, name: str | None = None, limit: int = 100
    ) -> list[JobView]:
        """Jobs, newest first: all that live, and with `live_only=False` the ended ones too.

        Raises InvalidSpec for a `limit` above 10,000.
        """
        await self._up()
        if limit > MOST_LISTED:
            raise InvalidSpec(
                f"limit: at most {MOST_LISTED} jobs are listed at once, not {limit}; `owner` and `name` narrow it down",
                field="limit",
            )
        async with self._listing:
            if not live_only:
                rows = await asyncio.to_thread(self._ledger.jobs, owner=owner, name=name, limit=limit)
                live = self._writer.view().jobs
                listed = [live.get(row.job.id, row.job) for row in rows]
                return await self._views(listed, [row.spec for row in rows])
            chosen = (
                job
                for job in reversed(list(self._writer.view().jobs.values()))
                if owner in (None, job.owner) and name in (None, job.name)
            )
            return await self._views(list(islice(chosen, limit)))

    async def wait(self, job_id: str, timeout_s: float, seen_status: str | None = None) -> JobView:
        """The job once it has ended, or its status is no longer `seen_status`, or `timeout_s` has passed.

        Or at once, where too many wait already: whoever asks then pauses before the next time.
        """
        await self._up()
        if self._waits >= MOST_WAITS:
            return await self._look(job_id)
        self._waits += 1
        try:
            return await self._wait(job_id, timeout_s, seen_status)
        finally:
            self._waits -= 1

    async def _wait(self, job_id: str, timeout_s: float, seen_status: str | None) -> JobView:
        deadline = time.monotonic() + min(timeout_s, LONGEST_WAIT_S)
        while True:
            job = await self._find_any(job_id)
            left = deadline - time.monotonic()
            if isinstance(job, Counter):
                view = await self._array_view(job_id, job)
                if view.ended or seen_status not in (None, view.status) or left <= 0:
                    return view
                await self._writer.changed(job_id, min(ARRAY_LOOK_S, left))
                await asyncio.sleep(ARRAY_PAUSE_S)
                continue
            if job.status.terminal or (seen_status not in (None, str(job.status))) or left <= 0:
                return await self._view(job)
            await self._writer.changed(job_id, left)

    async def settled(self, job_id: str) -> None:
        """Returns when the logs of a job that has ended are whole, or can't become so any more."""
        await self._up()
        await self._gangs.settled(job_id)

    async def cancel(self, job_id: str, by: str, *, released: bool = False) -> JobView:
        """Ask the job, or all jobs of the array, to end. Durable when this returns; what has ended is left as it is.

        Raises UnknownJob, and NotAllowed where it is not `by`'s to change.
        """
        await self._up()
        await self._require_change(job_id, by)
        stops = []
        for job in await self._live(job_id):
            cause = StopCause.RELEASED if released and job.kind is Kind.LEASE else StopCause.CANCELLED
            stops.append(StopRequested(self._clock(), job.id, cause, "" if released else by))
        await self._writer.request_all(stops)
        return await self._look(job_id)

    async def cancel_all(self, owner: str, by: str) -> int:
        """Ask every job of the owner to end, newest first so that none of them starts meanwhile. Returns how many.

        Durable when this returns. Raises NotAllowed where they are not `by`'s to change.
        """
        await self._up()
        rights.require_name(by)
        if self._admins:
            rights.require_change(f"what {owner} has submitted", owner, by, self._admins)
        now = self._clock()
        jobs = [job.id for job in reversed(list(self._writer.view().jobs.values())) if job.owner == owner]
        await self._writer.request_all(StopRequested(now, job_id, StopCause.CANCELLED, by) for job_id in jobs)
        return len(jobs)

    async def hold(self, job_id: str, by: str, *, held: bool) -> JobView:
        """Keep a queued job, or those of an array that are queued, from starting; or let it go. Durable then.

        Raises UnknownJob, NotAllowed where it is not `by`'s to change, and RequestError where nothing is queued.
        """
        await self._up()
        await self._require_change(job_id, by)
        live = await self._live(job_id)
        queued = [job for job in live if job.status is Status.QUEUED]
        if not queued:
            view = await self._look(job_id)
            raise RequestError(
                f"{job_id} is {view.status}: only what is queued can be {'held' if held else 'released'}",
                job=job_id,
            )
        now = self._clock()
        await self._writer.request_all([HoldChanged(now, job.id, held, by) for job in queued])
        return await self._look(job_id)

    async def heard(self, job_ids: list[str]) -> dict[str, str]:
        """The holder of these jobs is alive. Returns each job's status."""
        await self._up()
        for job_id in job_ids:
            self._holders.heard(job_id)
        return {job_id: str(await self._status(job_id)) for job_id in job_ids}

    async def why(self, job_id: str) -> dict[str, Any]:
        """Why the job does not run: code, message, evidence, advice. For a job that runs or ended, it says so.

        `start`: when a waiting job will start, see `forecast`.
        """
        await self._up()
        job = await self._find_any(job_id)
        if isinstance(job, Counter):
            live = await self._live(job_id)
            waiting = [each for each in live if each.status is Status.QUEUED]
            job = (waiting or live or [await self._find(f"{job_id}_0")])[0]
        reason = reason_dict(self._reasons([job]).get(job.id) or _not_waiting(job))
        assert reason is not None
        if job.status is Status.QUEUED and not job.held:
            reason["start"] = await self.forecast(job.id)
        return reason

    async def events(self, job_id: str | None = None, after: int = 0, limit: int = 1000) -> list[EventView]:
        """The ledger's history, oldest first. Raises InvalidSpec for a `limit` above 100,000."""
        await self._up()
        if limit > MOST_EVENTS:
            raise InvalidSpec(
                f"limit: at most {MOST_EVENTS} events are given at once, not {limit}; go on with `after`",
                field="limit",
            )
        if job_id is not None and isinstance(await self._find_any(job_id), Counter):
            return await asyncio.to_thread(self._ledger.events, None, after, limit, array_id=job_id)
        return await asyncio.to_thread(self._ledger.events, job_id, after, limit)

    async def nodes(self, *, gone: bool = False, booting: bool = False) -> list[NodeView]:
        """Every node with what is charged, foreign and free on it.

        `booting`: also nodes that are on their way. `gone`: also nodes that left, and are cordoned.
        """
        await self._up()
        views = self._node_views(self._writer.view().nodes.values())
        if booting:
            coming = self._writer.state.launches.on_their_way(self._clock())
            views += [booting_node_view(each) for each in coming if each.booting]
        if gone:
            views += [gone_node_view(each) for each in self._gone_cordons()]
        return views

    def _gone_cordons(self) -> list[Cordon]:
        """Cordons of nodes that are not there."""
        state = self._writer.state
        return [each for node_id, each in sorted(state.cordons.items()) if node_id not in state.nodes]

    async def scale(self) -> dict[str, Any]:
        """What is asked of the autoscaler and for whom, what boots, and what failed. Amounts are nodes.

        `types`: by node type `up`, `booting`, `most`, `wanted`, `price` (of a node in an hour, or None) and `failed`
        (None, or the `message` and the moment `until` which nothing is asked of it). `asks`: `node_types`, `jobs`.
        `price`, `price_wanted`: in an hour, of what is up and of what is wanted besides; types without one left out.
        """
        await self._up()
        launches, policy, now = self._writer.state.launches, self._writer.state.policy, self._clock()
        wanted = launches.wanted.nodes()
        failed = {
            name: {"message": each.message, "until": each.until, "in_a_row": each.in_a_row}
            for name, each in launches.failures.items()
            if now < each.until
        }
        types: dict[str, dict[str, Any]] = {
            name: {
                "gpus": shape.gpu_slots,
                "gpu_type": shape.gpu_type,
                "up": launches.up.get(name, 0),
                "booting": launches.booting.get(name, 0),
                "wanted": wanted.get(name, 0),
                "most": shape.most,
                "price": policy.prices.get(name),
                "failed": failed.get(name),
            }
            for name, shape in launches.types.items()
        }
        return {
            "at": now,
            "types": types,
            "most_in_all": launches.most_in_all,
            "asks": [
                {"node_types": list(ask.node_types), "jobs": list(ask.jobs)} for ask in launches.wanted.asks
            ],
            "price": sum((each["price"] or 0.0) * each["up"] for each in types.values()),
            "price_wanted": sum((each["price"] or 0.0) * each["wanted"] for each in types.values()),
        }

    def _node_views(self, nodes: Iterable[Node]) -> list[NodeView]:
        view, cordons, idle = self._writer.view(), self._writer.state.cordons, self._writer.state.idle_since
        warm, strays = self._stands.held(), self._writer.state.quarantines
        on: dict[str, list[str]] = {}
        for job in view.jobs.values():
            for node_id in {each.node_id for each in job.attempt.placed} if job.attempt else ():
                on.setdefault(node_id, []).append(job.id)
        listed = sorted(nodes, key=lambda node: (-node.gpu_slots, node.name, node.id))
        return [
            node_view(
                node,
                tuple(sorted(on.get(node.id, ()))),
                cordons.get(node.id),
                warm.get(node.id, {}),
                idle.get(node.id),
                strays[node.id].strays if node.id in strays else (),
            )
            for node in listed
        ]

    async def lease(self, job_id: str) -> dict[str, Any]:
        """What the holder of a running lease needs for its own Ray work: the group and its bundles."""
        await self._up()
        job = await self._find(job_id)
        if job.attempt is None or job.status is not Status.RUNNING:
            raise LeaseLost(f"lease {job_id} is {job.status}", job=job_id)
        group_id = self._placements.group_id(attempt_key(job_id, job.attempt.number))
        if group_id is None:
            raise LeaseLost(f"lease {job_id} has lost its placement group", job=job_id)
        return {
            "group_id": group_id,
            "bundles": [bundle_resources(job.gang.bundle)] * len(job.attempt.placed),
            "nodes": [each.node_id for each in job.attempt.placed],
        }

    @ray.method(max_task_retries=0)  # type: ignore[untyped-decorator]
    async def shutdown(self, *, cancel: bool, keep: bool = False, by: str = "") -> None:
        """End: with `cancel` every job first, else only if none lives. The caller then kills the actor.

        `keep`: the jobs are for the next allocator, so that there is nothing to do but to ask whether `by` may.
        Raises NotAllowed.
        """
        await self._up()
        self._require_admin("stop the allocator", by)
        if keep:
            await self._let_go()
            return
        live = list(self._writer.view().jobs.values())
        if live and not cancel:
            raise AllocatorUnavailable(
                f"{len(live)} jobs are live; `rmctl stop --cancel-jobs` ends them first, "
                "`rmctl stop --keep-jobs` leaves them running for the next allocator"
            )
        self._closing = True
        now = self._clock()
        await self._writer.request_all(StopRequested(now, job.id, StopCause.CANCELLED, by) for job in live)
        while self._writer.view().jobs:
            await asyncio.sleep(0.05)
        await self._let_go()
        self._writer.stop()

    async def _let_go(self) -> None:
        """What no job has: groups that are warm, ask for nodes or keep them, and GPUs in quarantine."""
        self._stands.retire_all()
        await self._stands.all_gone()
        await self._ends.delivered(SETTLE_S)
        await self._asks.close()
        await self._stays.close()
        await self._wardens.close()

    # --- asked by administrators ---------------------------------------------------------------------------

    async def apply(
        self, text: str, by: str, *, dry_run: bool = False, force: bool = False
    ) -> dict[str, Any]:
        """Put the rules of an rm.yaml in force. Returns `applied`, `warnings`, `consequences`.

        A dry run is everybody's. Raises InvalidSpec, also where the new rules would lock `by` out and `force` does not
        say that it is meant; NotAllowed where `by` is no admin.
        """
        await self._up()
        settings = Settings.parse(text)
        policy, state = settings.policy(), self._writer.state
        effects = consequences(state.jobs.values(), state.node_shapes(), state.policy, policy)
        doubts = rights.doubts(by, self._admins, policy.admins)
        if not dry_run:
            await self.apply_policy(policy, text, by, force=force)
        return {
            "applied": not dry_run,
            "warnings": [*doubts, *settings.warnings()],
            "consequences": [str(each) for each in effects],
        }

    async def queues(self) -> list[QueueView]:
        """The tree of queues with what each owns, uses and borrows."""
        await self._up()
        state = self._writer.state
        return queue_views(state.policy, state.books.quota, state.jobs.values(), state.capacity.by_type())

    async def cordon(
        self,
        nodes: list[str],
        by: str,
        reason: str = "",
        *,
        drain: bool = False,
        deadline_s: float | None = None,
    ) -> list[NodeView]:
        """Place nothing new on these nodes; with `drain` empty them, by force after `deadline_s`. Raises UnknownNode.

        Durable when this returns, and all or none. What was said of a node before is replaced. Raises NotAllowed.
        """
        await self._up()
        self._require_admin("cordon nodes", by)
        chosen = named(nodes, self._writer.view().nodes)
        now = self._clock()
        deadline = None if deadline_s is None else now + deadline_s
        await self._writer.request_all(
            [NodeCordoned(now, node.id, by, reason, drain, deadline) for node in chosen]
        )
        return self._still_there(chosen)

    async def uncordon(self, nodes: list[str], by: str) -> list[NodeView]:
        """Place jobs on these nodes again, and forget what was counted against them. Raises UnknownNode, NotAllowed.

        Nodes that are gone can be named too: their cordons are forgotten.
        """
        await self._up()
        self._require_admin("uncordon nodes", by)
        gone = {each.node_id: _departed(each) for each in self._gone_cordons()}
        chosen = named(nodes, self._writer.view().nodes, gone)
        now = self._clock()
        await self._writer.request_all([NodeUncordoned(now, node.id, by) for node in chosen])
        return self._still_there(chosen)

    def _still_there(self, nodes: Iterable[Node]) -> list[NodeView]:
        now = self._writer.view().nodes
        return self._node_views(now[node.id] for node in nodes if node.id in now)

    async def forecast(self, job_id: str) -> dict[str, Any]:
        """When a queued job will start: `p50_s`, `p90_s` from now (None without a basis), and `basis`."""
        await self._up()
        job = await self._find(job_id)
        if job.status is not Status.QUEUED:
            return {"p50_s": None, "p90_s": None, "basis": f"it does not wait: it is {job.status}"}
        if self._forecasts >= MOST_FORECASTS:
            return {"p50_s": None, "p90_s": None, "basis": "too many ask for an estimate right now"}
        self._forecasts += 1
        try:
            # Whoever waits for a turn holds no copy of the jobs: it is taken when the turn comes.
            async with self._estimating:
                twin = Twin(self._writer.state, self._clock())
                loop = asyncio.get_running_loop()
                return asdict(await loop.run_in_executor(self._forecaster, twin.forecast, job_id))
        finally:
            self._forecasts -= 1

    async def audit(self, *, look: bool = True) -> AuditView:
        """Compare the ledger, Ray's tables and the GPUs' drivers, and repair. `look=False`: what the last one found."""
        await self._up()
        if not look and self._audit.last is not None:
            return self._audit.last
        return await self._audit.audit()

    async def apply_policy(self, policy: Policy, text: str, by: str, *, force: bool = False) -> None:
        """Put these rules in force. Durable when this returns; what runs goes on unless the rules reclaim it.

        Raises NotAllowed and InvalidSpec as `apply`.
        """
        await self._up()
        rights.require_name(by)
        rights.require_new_rules(by, self._admins, policy.admins, force=force)
        await self._writer.apply_policy(policy, text, by)

    async def policy(self) -> dict[str, Any]:
        """The rules in force: `policy`, the `text` that they came from, `by` whom and `at` what time."""
        await self._up()
        applied = self._writer.policy
        return {"policy": applied.policy, "text": applied.text, "by": applied.by, "at": applied.at}

    # --- told by runners -----------------------------------------------------------------------------------

    async def progress(self, job_id: str, attempt: int, report: dict[str, Any]) -> None:
        """What rank 0 last reported: metrics, for people, and when it last saved its work, to decide on."""
        await self._up()
        self._keep_progress(job_id, attempt, report)

    def _keep_progress(self, job_id: str, attempt: int, report: dict[str, Any]) -> None:
        job = self._writer.view().jobs.get(job_id)
        if job is None or job.attempt is None or job.attempt.number != attempt:
            return
        report = dict(report)
        age_s = report.pop("checkpoint_age_s", None)
        told = self._last_progress.get(job_id, {}).get("checkpoint_at")
        # The same one is reported again and again. By its time there: its age drifts while our clock is slewed.
        if age_s is not None and (told is None or report.get("checkpoint_at") != told):
            # Its age, not its time: the clocks of nodes differ.
            at = self._clock() - age_s
            if at > (job.attempt.checkpoint_at or 0.0) + SAME_CHECKPOINT_S:
                self._writer.post(CheckpointReported(at, job_id, attempt))
        self._last_progress[job_id] = report
        self._last_progress.move_to_end(job_id)
        while len(self._last_progress) > PROGRESS_KEPT:
            self._last_progress.popitem(last=False)

    # --- shared --------------------------------------------------------------------------------------------

    async def _up(self) -> None:
        await self._ready.wait()
        if self._broken is not None:
            if isinstance(self._broken, LedgerUnavailable):
                raise LedgerUnavailable(
                    f"the allocator could not start: {self._broken}. When that is mended: `rmctl stop --keep-jobs`, "
                    "then `rmctl start`"
                )
            raise AllocatorUnavailable(f"the allocator could not start: {self._broken!r}")

    @property
    def _admins(self) -> tuple[str, ...]:
        return self._writer.policy.policy.admins

    def _require_admin(self, what: str, by: str) -> None:
        """Raises NotAllowed where only others may do this. `what`: "cordon nodes"."""
        rights.require_name(by)
        rights.require_admin(what, by, self._admins)

    async def _require_change(self, job_id: str, by: str) -> None:
        """Raises UnknownJob, and NotAllowed where the job, or the array, is not `by`'s to change."""
        rights.require_name(by)
        if not self._admins:
            return
        found = await self._find_any(job_id)
        job = await self._find(f"{job_id}_0") if isinstance(found, Counter) else found
        rights.require_change(job_id, job.owner, by, self._admins)

    async def _look(self, job_id: str) -> JobView:
        found = await self._find_any(job_id)
        if isinstance(found, Counter):
            return await self._array_view(job_id, found)
        return await self._view(found)

    async def _status(self, job_id: str) -> Status:
        """Without the rest of a view: heartbeats ask every two seconds, and a reason costs a walk over the queue."""
        found = await self._find_any(job_id)
        return array_status(found) if isinstance(found, Counter) else found.status

    async def _live(self, job_id: str) -> list[Job]:
        """The job, or the jobs of the array, that have not ended. Raises UnknownJob."""
        found = await self._find_any(job_id)
        if isinstance(found, Counter):
            live = self._writer.view().jobs
            jobs = [live[each] for each in self._live_members(job_id)]
        else:
            jobs = [found]
        return [job for job in jobs if not job.status.terminal]

    def _live_members(self, array_id: str) -> list[str]:
        return [job.id for job in self._writer.view().jobs.values() if job.array == array_id]

    async def _find_any(self, job_id: str) -> Job | Counter[Status]:
        """A job, or how many jobs of an array have which status. Raises UnknownJob."""
        try:
            return await self._find(job_id)
        except UnknownJob:
            tally = await self._tally(job_id)
            if not tally:
                raise
            return tally

    async def _tally(self, array_id: str) -> Counter[Status]:
        return Counter(await asyncio.to_thread(self._ledger.tally, array_id))

    async def _array_view(self, array_id: str, tally: Counter[Status]) -> JobView:
        first = await self._view(await self._find(f"{array_id}_0"))
        ended_at = None
        if all(status in TERMINAL for status in tally):
            ended_at = await asyncio.to_thread(self._ledger.last_end, array_id)
        return array_view(array_id, first, tally, ended_at)

    async def _find(self, job_id: str) -> Job:
        view = self._writer.view()
        job = view.jobs.get(job_id) or view.ended.get(job_id)
        if job is None:
            row = await asyncio.to_thread(self._ledger.job, job_id)
            if row is None:
                raise UnknownJob(f"no job {job_id!r} in this ledger; `rmctl ls --all` lists them", job=job_id)
            job = row.job
        return job

    async def _view(self, job: Job) -> JobView:
        return (await self._views([job]))[0]

    async def _views(self, jobs: Sequence[Job], specs: Sequence[JobSpec] | None = None) -> list[JobView]:
        """What readers get. The reasons of the first come from one walk over the queue."""
        if specs is None:
            specs = await self._requests.of([job.id for job in jobs])
        names = {node.id: node.name for node in self._writer.view().nodes.values()}
        reasons, now = self._reasons(jobs[:FRESH_REASONS]), self._clock()
        views = []
        for job, spec in zip(jobs, specs, strict=True):
            ranks = spec.processes_per_bundle(job.gang.bundle.gpu_units)
            views.append(
                job_view(
                    job,
                    command=_command_line(spec),
                    progress=self._last_progress.get(job.id),
                    node_names=names,
                    ranks=ranks * (len(job.attempt.placed) if job.attempt else job.gang.count),
                    reason=reasons.get(job.id),
                    as_of=now,
                    stand=self._stand(job),
                )
            )
            if not len(views) % VIEWS_A_SLICE:
                await asyncio.sleep(0)
        return views

    def _stand(self, job: Job) -> str:
        """The name of the stand that the job has. As committed where it is: in memory it may be the next one's yet."""
        if job.attempt is None:
            return ""
        return job.attempt.stand or self._placements.name(attempt_key(job.id, job.attempt.number))

    def _reasons(self, jobs: Iterable[Job]) -> dict[str, Reason]:
        """Why those of the jobs wait that do: by id."""
        live = self._writer.state.jobs
        known = [live[job.id] for job in jobs if job.status is Status.QUEUED and job.id in live]
        queued = [job for job in known if job.status is Status.QUEUED]
        return why_each(self._writer.state, queued, self._clock()) if queued else {}


def _departed(cordon: Cordon) -> Node:
    """A node that is gone, to be named by: nothing of it is known but its name."""
    return Node(cordon.node_id, cordon.name or cordon.node_id[:8], 0, Devices.whole(0), 0, 0, 0, 0)


def _command_line(spec: JobSpec) -> str:
    return shlex.join(spec.command) if spec.command else spec.name


def _not_waiting(job: Job) -> Reason:
    if job.status.terminal:
        how = f": {job.outcome.message}" if job.outcome and job.outcome.message else ""
        return Reason("Ended", f"it does not wait: {job.status}{how}")
    return Reason("NotWaiting", f"it does not wait for GPUs: it is {job.status} and holds {job.gang}")


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)
