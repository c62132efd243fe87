"""The eye of the fault machine: compares, all the while, what the allocator says with Ray's own tables."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

from fault_work import Work
from fault_world import World, group_table

from rm.errors import ClusterError, UnknownJob
from rm.job import TERMINAL

PAUSE_S = 0.2
LOOKED_UP = 3
GONE_S = 15.0
"""How long what was kept warm may take to go, a restart of the allocator in between included."""


class Watch(threading.Thread):
    """Samples until `stop` is set. `live`: the last views of live jobs, by id.

    A group that Ray holds must be charged in the reading before or after it. With restarts between the two readings a
    short job may begin and end there, so what looks uncharged is kept, and `settle` asks the ledger for that moment.
    """

    def __init__(self, world: World, work: Work, violation: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self.world, self.work, self.violation = world, work, violation
        self.stop = threading.Event()
        self.rng = random.Random(0)
        self.live: dict[str, Any] = {}
        self.samples = 0
        self.most = 0.0
        self.errors = 0
        self.ended: dict[str, str] = {}
        self.ours: set[str] = set()
        """Groups that the machine made itself."""
        self.doubts: dict[str, tuple[float, float]] = {}
        """Attempts whose group was seen uncharged, and between which two moments."""

    def run(self) -> None:
        while not self.stop.wait(PAUSE_S):
            try:
                self.look()
            except ClusterError:
                self.errors += 1
            except Exception as error:
                self.violation(f"a look at the cluster ended in {error!r}")

    def look(self) -> None:
        began = time.time()
        before, warm = self._charged(), self._warm()
        held = {each["name"]: each["gpus"] for each in group_table() if each["name"] not in self.ours}
        warm |= self._warm()
        after = self._charged()
        ended = time.time()
        self.samples += 1
        for name, gpus in held.items():
            attempt = name.rsplit("/", 1)[1]
            charged = max(before.get(attempt, 0), after.get(attempt, 0))
            if not charged:
                if attempt in warm:
                    continue
                self.doubts.setdefault(attempt, (began, ended))
            elif gpus > charged:
                self.violation(f"Ray holds {gpus:g} GPUs for {attempt}, {charged:g} are charged")
        # Not by job: a lost node's are charged until they are released, when another may be in its place.
        nodes = self.world.client.nodes()
        self.most = max(self.most, sum(node.charged_gpus for node in nodes))
        for node in nodes:
            if node.charged_gpus > node.gpus or node.free_gpus < 0:
                self.violation(f"{node.charged_gpus:g} of {node.gpus} GPUs are charged on {node.id[:8]}")
        known = list(self.work.acked)
        for job_id in self.rng.sample(known, min(LOOKED_UP, len(known))):
            self.look_up(job_id)

    def _charged(self) -> dict[str, float]:
        self.live = {job.id: job.last for job in self.world.client.jobs(limit=1000)}
        return {
            v.stand or f"{v.id}.{v.attempts}": v.held_gpus for v in self.live.values() if v.status != "QUEUED"
        }

    def _warm(self) -> set[str]:
        """The groups that are kept for the next job."""
        return {name for node in self.world.client.nodes() for name in node.warm}

    def look_up(self, job_id: str) -> None:
        """An id that was acknowledged stays known, and what has ended stays so."""
        try:
            status = self.world.client.job(job_id).last.status
        except UnknownJob:
            self.violation(f"{job_id} was acknowledged and is unknown now")
            return
        if (before := self.ended.get(job_id, status)) != status:
            self.violation(f"{job_id} had ended as {before} and is {status} now")
        if status in TERMINAL:
            self.ended[job_id] = status

    def settle(self, events: list[Any]) -> None:
        """Was what looked uncharged charged at that moment, or had it been a moment ago and was yet to go?"""
        stands: dict[str, str] = {}
        charged: dict[str, list[tuple[float, float]]] = {}
        since: dict[str, float] = {}
        for event in events:
            attempt = f"{event.job_id}.{event.attempt}"
            if event.kind == "JobAdmitted":
                since[attempt] = event.at
            elif event.kind == "PlacementReady":
                stands[attempt] = event.body.get("stand") or attempt
            elif event.kind == "PlacementReleased":
                held = since.pop(attempt), event.at + GONE_S
                charged.setdefault(stands.get(attempt, attempt), []).append(held)
        for attempt, at in since.items():
            charged.setdefault(stands.get(attempt, attempt), []).append((at, float("inf")))
        for attempt, (began, ended) in self.doubts.items():
            if not any(at <= ended and until >= began for at, until in charged.get(attempt, [])):
                self.violation(f"Ray held a group for {attempt} while nothing was charged for it")
