"""Stands: placement groups with the runners in them. Handed on from one attempt to the next, or taken down.

Ray needs about a second to give the GPUs of a removed group to the next one, and another to start an actor there. So
when an attempt has ended and left nothing behind, its stand stays for `keep_s`. For the scheduler its GPUs are free.
The next attempt that is placed on the same nodes, with the same bundles and the same runtime_env, takes it over as it
is; what another gang needs of its GPUs makes it go at once. User code is a child process of a runner and ends with its
attempt, so that nothing of one job is there for the next.

A stand bears the name of the attempt that it was made for (Ray's groups and actors can't be renamed). Who has it now
stands in the ledger (`Attempt.stand`), so that it is found after a restart. One that nobody has is not worth
remembering: the next allocator removes it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rm.core.model import Gang, PlacedBundle, units_by_node
from rm.core.resources import GPU_UNIT, Bundle
from rm.runtime.log_ends import LogEnds
from rm.runtime.nodes import NodeWatch, Seen
from rm.runtime.orders import Seat
from rm.runtime.placements import Placements
from rm.runtime.runners import Runners

log = logging.getLogger("rm.stands")

SETTLE_S = 65.0
"""A little longer than a runner looks for a store that is away."""
REMOVE_AGAIN_S = 5.0
"""Removal is asked for again when the group is still there after this long: Ray can lose the first request."""


@dataclass(slots=True)
class Stand:
    """One group with its runners. `holder`: the attempt that has it, or had it last; `before`: who had it before."""

    holder: str
    name: str
    bundle: Bundle
    places: tuple[object, ...]
    runtime_env: str
    runners: list[Any]
    seats: list[Seat]
    units: Counter[str]
    """GPU units by node."""
    before: str = ""
    expiry: asyncio.TimerHandle | None = field(default=None, repr=False)


class Stands:
    """The stands of one ledger. Runs in the writer's event loop."""

    def __init__(
        self, placements: Placements, runners: Runners, watch: NodeWatch, ends: LogEnds, keep_s: float
    ) -> None:
        """`ends`: sends what runners can't send before they end."""
        self._ends = ends
        self._placements = placements
        self._runners = runners
        self._watch = watch
        self._keep_s = keep_s
        self._idle: dict[str, Stand] = {}
        self._taken: dict[str, Stand] = {}
        self._promised: set[str] = set()
        """Attempts among them of which nobody else can know yet: their taking it is not committed."""
        self._leaving: dict[str, Stand] = {}
        """Idle ones that are being taken down, by holder like the others."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._watches: set[asyncio.Task[None]] = set()

    # --- one attempt's ---------------------------------------------------------------------------------------

    def taken(self, attempt: str) -> Stand | None:
        """The stand that the attempt has taken over; None where its runners have to be started or found."""
        return self._taken.get(attempt)

    async def take_down(
        self, attempt: str, node_ids: set[str], count: int, runners: Iterable[Any] = ()
    ) -> None:
        """End the runners, remove the group, and see its GPUs free. Returns when that is so, however long it takes.

        `runners`: those that may have logs left to send, where the attempt has no stand that was handed on to it.
        """
        stand = self._taken.get(attempt) or self._leaving.get(attempt)
        await self._collect(stand.runners if stand is not None else runners)
        while True:
            try:
                await self._runners.kill(self._placements.name(attempt), count)
                group_id = await self._placements.remove(attempt)
                if group_id is None:
                    break
                gone = _gone(group_id, node_ids, time.monotonic())
                if await self._watch.until(gone, REMOVE_AGAIN_S):
                    break
            except Exception:
                # Whatever it is: if we stopped here, nobody would ever give these GPUs back.
                log.warning("release of %s failed; trying again", attempt, exc_info=True)
                await asyncio.sleep(1)
        self._taken.pop(attempt, None)
        self._placements.forget(attempt)

    # --- handed on -------------------------------------------------------------------------------------------

    def keep(
        self,
        attempt: str,
        gang: Gang,
        placed: Sequence[PlacedBundle],
        env: dict[str, Any],
        runners: list[Any],
        seats: list[Seat],
    ) -> bool:
        """The attempt has ended and its runners are idle: keep them for the next. False where nothing is kept.

        `seats` is where they sit, with ports that are free now.
        """
        if not self._keep_s or attempt in self._leaving or self._placements.handle(attempt) is None:
            return False
        stand = self._taken.pop(attempt, None)
        if stand is None:
            stand = Stand(
                attempt,
                self._placements.name(attempt),
                gang.bundle,
                _places(gang.bundle, placed),
                env_key(env),
                runners,
                seats,
                units_by_node(placed, gang.bundle.gpu_units),
            )
            self._start_task(self._mourn(stand), f"life of {stand.name}", self._watches)
        stand.seats = seats
        loop = asyncio.get_running_loop()
        stand.expiry = loop.call_later(self._keep_s, self._retire, stand)
        self._idle[attempt] = stand
        return True

    def promise(self, attempt: str, gang: Gang, placed: Sequence[PlacedBundle], env: dict[str, Any]) -> bool:
        """`take`, before that is committed: until it is `kept` the stand is nobody's to all who look."""
        taken = self.take(attempt, gang, placed, env)
        if taken:
            self._promised.add(attempt)
        return taken

    def kept(self, attempt: str) -> None:
        """If something was promised to the attempt, that is committed now."""
        self._promised.discard(attempt)

    def keep_promises(self, attempts: Collection[str]) -> None:
        """These are the attempts that there are: what was promised to others goes.

        It goes under the name of who had it before: another attempt may soon be what the one that never was would
        have been, and make a group of its own.
        """
        for attempt in self._promised.difference(attempts):
            stand = self._taken.pop(attempt)
            self._placements.hand_over(attempt, stand.before)
            stand.holder = stand.before
            self._idle[stand.holder] = stand
            self._retire(stand)
        self._promised.clear()

    def may_take(self, gang: Gang, placed: Sequence[PlacedBundle]) -> bool:
        """Whether an idle stand has these bundles in these places, whatever its runtime_env."""
        places = _places(gang.bundle, placed)
        return any(each.bundle == gang.bundle and each.places == places for each in self._idle.values())

    def take(self, attempt: str, gang: Gang, placed: Sequence[PlacedBundle], env: dict[str, Any]) -> bool:
        """Give an idle stand of this kind, the one used last, to the attempt. False where there is none."""
        wanted = gang.bundle, _places(gang.bundle, placed), env_key(env)
        for stand in reversed(self._idle.values()):
            if (stand.bundle, stand.places, stand.runtime_env) == wanted:
                del self._idle[stand.holder]
                assert stand.expiry is not None
                stand.expiry.cancel()
                self._placements.hand_over(stand.holder, attempt)
                stand.before, stand.holder = stand.holder, attempt
                self._taken[attempt] = stand
                return True
        return False

    def make_room(self, node_id: str, units: int) -> None:
        """Somebody else needs so much more of the node than is free: take idle stands there down, the oldest first."""
        coming = sum(each.units[node_id] for each in self._leaving.values())
        for stand in list(self._idle.values()):
            if coming >= units:
                return
            if stand.units[node_id]:
                coming += stand.units[node_id]
                self._retire(stand)

    def held(self) -> dict[str, dict[str, int]]:
        """What stands without an attempt hold yet: node → name → GPU units."""
        held: dict[str, dict[str, int]] = {}
        for stand in self._unused():
            for node_id, units in stand.units.items():
                held.setdefault(node_id, {})[stand.name] = units
        return held

    def unused(self) -> frozenset[str]:
        """The names of the stands that no attempt has."""
        return frozenset(each.name for each in self._unused())

    def unused_groups(self) -> frozenset[str]:
        """The same, Ray's ids of their groups."""
        return frozenset(filter(None, (self._placements.group_id(each.holder) for each in self._unused())))

    def _unused(self) -> list[Stand]:
        promised = [self._taken[attempt] for attempt in self._promised]
        return [*self._idle.values(), *self._leaving.values(), *promised]

    def retire_all(self) -> None:
        """Nobody comes any more."""
        for stand in list(self._idle.values()):
            self._retire(stand)

    async def all_gone(self) -> None:
        """Returns when what was to be taken down is gone."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _retire(self, stand: Stand) -> None:
        if self._idle.pop(stand.holder, None) is None:
            return
        assert stand.expiry is not None
        stand.expiry.cancel()
        self._leaving[stand.holder] = stand
        self._start_task(self._retired(stand), f"retire {stand.name}", self._tasks)

    async def _retired(self, stand: Stand) -> None:
        try:
            await self.take_down(stand.holder, set(stand.units), len(stand.runners))
        finally:
            self._leaving.pop(stand.holder, None)

    async def _collect(self, runners: Iterable[Any]) -> None:
        """Have runners send what is left of logs, and send in their place what the store does not take now."""
        await settled(map(self._hand_in, runners))

    async def _hand_in(self, runner: Any) -> None:
        try:
            left = await runner.hand_in.remote()
        except Exception:
            log.warning("logs may be lost: a runner can't be asked for what is left of them", exc_info=True)
            return
        for end in left:
            self._ends.send(end, at_once=True)

    async def _mourn(self, stand: Stand) -> None:
        """Take it down when a runner dies while nobody needs it. Who has it then notices by himself."""
        lives = [asyncio.ensure_future(runner.life.remote()) for runner in stand.runners]
        await asyncio.wait(lives, return_when=asyncio.FIRST_COMPLETED)
        for life in lives:
            if life.done():
                life.exception()  # looked at, or asyncio complains
            life.cancel()
        self._retire(stand)

    def _start_task(self, work: Coroutine[Any, Any, None], name: str, among: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work, name=name)
        among.add(task)
        task.add_done_callback(among.discard)


async def settled(calls: Iterable[Awaitable[None]]) -> None:
    """Wait until runners have sent the ends of logs away, but not for ever: whoever is dead sends no more."""
    answers = [asyncio.ensure_future(each) for each in calls]
    if not answers:
        return
    await asyncio.wait(answers, timeout=SETTLE_S)
    for each in answers:
        if not each.cancel():
            each.exception()


def env_key(runtime_env: dict[str, Any]) -> str:
    """Equal for runtime environments that are equal."""
    return json.dumps(runtime_env, sort_keys=True, default=str) if runtime_env else ""


def _places(bundle: Bundle, placed: Sequence[PlacedBundle]) -> tuple[object, ...]:
    """What two gangs of equal bundles must have in common. Of a shared device, which one it is."""
    if bundle.gpu_units % GPU_UNIT:
        return tuple((each.node_id, each.slots) for each in placed)
    return tuple(each.node_id for each in placed)


def _gone(group_id: str, node_ids: set[str], since: float) -> Callable[[Seen], bool]:
    """Whether a reading begun after `since` shows the group on none of its nodes."""
    return lambda seen: seen.at > since and all(seen.lacks(group_id, node_id) for node_id in node_ids)
