"""Saying that this process is alive, for the attached jobs and leases that end when it is silent for too long.

The allocator ends what it does not hear of. The other way round holds as well: who has had no answer for as long has to
reckon with it, most of all where the whole head was replaced, whose successor this process can't reach.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from rm.errors import RmError

log = logging.getLogger("rm.heartbeat")

HEARTBEAT_S = 2.0
"""How often an attached client says that it is alive."""
LEAST_WAIT_S = 0.5
ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELLED", "TIMED_OUT"})

Tell = Callable[[list[str], float], Mapping[str, str]]
"""Tells the allocator that the holder of these jobs is alive, and waits so long for an answer: each job's status.

Raises RmError where there is none; anything else where this process has left the cluster.
"""


class Heartbeat:
    """For the jobs of this process. One daemon thread, started when needed."""

    def __init__(self, tell: Tell, *, every_s: float = HEARTBEAT_S) -> None:
        self._tell = tell
        self._every_s = every_s
        self._ttl_s: dict[str, float] = {}
        self._answered_at = 0.0
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, ttl_s: Mapping[str, float]) -> None:
        """By job, how long its holder may be silent. The allocator has just told us of them."""
        with self._lock:
            self._answered_at = time.monotonic()
            self._ttl_s |= ttl_s
            if self._thread is None or not self._thread.is_alive():
                self._wake.clear()
                self._thread = threading.Thread(target=self._run, name="rm-heartbeat", daemon=True)
                self._thread.start()

    def drop(self, job_id: str) -> None:
        """Nobody is to hold it any more: what can't be ended ends when we are silent."""
        with self._lock:
            self._ttl_s.pop(job_id, None)

    def stop(self) -> None:
        self._wake.set()

    @property
    def silence_s(self) -> float:
        """How long ago the allocator has answered last, at least one heartbeat being under way since."""
        return time.monotonic() - self._answered_at

    def _run(self) -> None:
        while not self._wake.wait(self._every_s):
            with self._lock:
                ttl_s = dict(self._ttl_s)
            if not ttl_s:
                continue
            # Not beyond the moment at which there is something to say.
            left_s = (
                min((ttl for ttl in ttl_s.values() if ttl > self.silence_s), default=0.0) - self.silence_s
            )
            try:
                statuses = self._tell(sorted(ttl_s), min(2 * self._every_s, max(LEAST_WAIT_S, left_s)))
            except RmError:
                # It restarts, mostly; what matters is that somebody asks again.
                self._warn(ttl_s)
            except Exception:
                return  # this process has left the cluster
            else:
                self._heard(statuses)

    def _warn(self, ttl_s: Mapping[str, float]) -> None:
        silence_s = self.silence_s
        lost = sorted(
            job_id for job_id, ttl in ttl_s.items() if ttl <= silence_s and job_id not in self._warned
        )
        if lost:
            self._warned |= set(lost)
            log.warning(
                "the allocator has not answered for %.0f s. Take it that %s, which this process holds, %s ended: the "
                "allocator ends what it does not hear of for so long, and so does a new head",
                silence_s,
                ", ".join(lost),
                "is" if len(lost) == 1 else "are",
            )

    def _heard(self, statuses: Mapping[str, str]) -> None:
        with self._lock:
            self._answered_at = time.monotonic()
            for job_id, status in statuses.items():
                if status in ENDED:
                    self._ttl_s.pop(job_id, None)
            warned, self._warned = self._warned & statuses.keys(), set()
        if warned:
            words = ", ".join(f"{job_id} is {statuses[job_id]}" for job_id in sorted(warned))
            log.warning("the allocator answers again: %s", words)
