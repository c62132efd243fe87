"""How long a job will run, from how long similar ones ran. Robust: quantiles of the last runs, never a mean.

Similar means, from near to far: the owner's jobs of this name and shape; the owner's jobs of this shape; the
queue's jobs of this shape; the queue's jobs. The nearest level with enough runs speaks. Without any, a time limit
is the only bound, and without that there is no basis, which is said and not papered over.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from rm.core.model import Job

ENOUGH = 5
"""Runs that a level needs to be believed."""
KEPT = 100
"""Runs that a level remembers."""
LEVELS_KEPT = 20_000


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of run time: median and 90th percentile, and what they are based on."""

    p50_s: float
    p90_s: float
    basis: str


class _Runs:
    """The last durations of one level, in order of time and of size."""

    __slots__ = ("recent", "sizes")

    def __init__(self) -> None:
        self.recent: deque[float] = deque()
        self.sizes: list[float] = []

    def add(self, seconds: float) -> None:
        self.recent.append(seconds)
        insort(self.sizes, seconds)
        if len(self.recent) > KEPT:
            old = self.recent.popleft()
            del self.sizes[bisect_left(self.sizes, old)]

    def quantile(self, q: float, longer_than: float) -> float | None:
        """Of the runs that lasted longer than `longer_than`, or None where none did."""
        first = bisect_right(self.sizes, longer_than)
        left = len(self.sizes) - first
        if not left:
            return None
        return self.sizes[first + min(left - 1, int(q * left))]


class Predictor:
    """Learns from ended jobs. The state owns it; the ledger's history fills it after a restart."""

    def __init__(self) -> None:
        self._levels: OrderedDict[tuple[object, ...], _Runs] = OrderedDict()

    def learn(self, job: Job, seconds: float) -> None:
        """A job ended by itself after `seconds` of run time."""
        for _, key in _levels(job):
            runs = self._levels.get(key)
            if runs is None:
                runs = self._levels[key] = _Runs()
                if len(self._levels) > LEVELS_KEPT:
                    self._levels.popitem(last=False)
            else:
                self._levels.move_to_end(key)
            runs.add(seconds)

    def predict(self, job: Job, ran_s: float = 0.0) -> Prediction | None:
        """Total run time of a job that has already run for `ran_s`. None where there is no basis."""
        limit_s = job.time_limit_s
        for words, key in _levels(job):
            runs = self._levels.get(key)
            if runs is None or len(runs.sizes) < ENOUGH:
                continue
            p50, p90 = runs.quantile(0.5, ran_s), runs.quantile(0.9, ran_s)
            if p50 is None or p90 is None:
                continue  # it has outlived all that this level knows
            if limit_s is not None:
                p50, p90 = min(p50, limit_s), min(p90, limit_s)
            return Prediction(p50, p90, f"{len(runs.sizes)} runs of {words}")
        if limit_s is not None:
            return Prediction(limit_s, limit_s, "its time limit")
        if ran_s > 0:
            # Nothing alike has run as long: the best guess is that half its life lies before it.
            return Prediction(2 * ran_s, 10 * ran_s, "how long it runs already")
        return None


def _levels(job: Job) -> Iterator[tuple[str, tuple[object, ...]]]:
    units = job.gang.gpu_units
    yield f"{job.owner}'s {job.name} on as many GPUs", (job.owner, job.name, units)
    yield f"{job.owner}'s jobs on as many GPUs", (job.owner, units)
    yield f"queue {job.queue}'s jobs on as many GPUs", (job.queue, units, None, None)
    yield f"queue {job.queue}'s jobs", (job.queue, None, None, None, None)
