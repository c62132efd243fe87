"""How much longer a job will need, as a rank: the inverse Gittins index, learnt from jobs that have ended.

Nobody knows a job's duration, but from the durations of similar jobs follows how likely it ends soon *given that it
has run as long as it has*. The index of a job at age a is the best ratio, over all horizons, of the chance to end
within the horizon to the time spent in trying; its inverse is in seconds and takes the place of the remaining time
in "shortest first". It is optimal for mean completion time on one server (Gittins, JRSS B 1979) and was shown to
work on clusters without any estimate by the user (Tiresias, NSDI '19).

Durations are counted in bins that grow by √2. Each context (everything; the size; the queue and size; the owner in
the queue and size) is a survival table, and a finer table leans on the coarser one as far as it has seen little.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

from rm.core.model import Job
from rm.core.resources import GPU_UNIT

FIRST_S = 15.0
BINS = 38
EDGES = [0.0, *(FIRST_S * math.sqrt(2.0) ** step for step in range(BINS + 1))]
"""Bin b is [EDGES[b], EDGES[b+1]); the last one reaches 60 days."""
HAZARD = 0.08
"""Chance to end within a bin where nothing is known."""
TRUST = (4.0, 8.0, 8.0, 8.0)
"""Per level, how many jobs the coarser table counts for."""
LARGE = 8
"""Sizes above this count as one."""
CONTEXTS_KEPT = 20_000

Context = tuple[object, ...]


def age_bin(seconds: float) -> int:
    """The bin in which a job of this age is."""
    return min(BINS - 1, max(0, bisect_right(EDGES, seconds) - 1))


class Remaining:
    """Survival tables by context, and the ranks that follow from them."""

    def __init__(self) -> None:
        self._tables: dict[Context, list[int]] = {}
        """Context → jobs that ended in each bin."""
        self._learnt = 0
        self._ranks: dict[Context, tuple[int, list[float]]] = {}

    def learn(self, job: Job, seconds: float) -> None:
        """A job ended after `seconds` of run time."""
        last = age_bin(seconds)
        self._learnt += 1
        for context in contexts(job):
            table = self._tables.get(context)
            if table is None:
                if len(self._tables) >= CONTEXTS_KEPT:
                    continue
                table = self._tables[context] = [0] * BINS
            table[last] += 1

    def rank(self, job: Job, age_s: float) -> float:
        """Seconds: lower comes first. Never below one."""
        chain = contexts(job)
        known = self._ranks.get(chain[-1])
        # A table changes little with one more job: its ranks are renewed when it knows 1 % more.
        if known is None or self._learnt - known[0] > known[0] // 100:
            known = self._ranks[chain[-1]] = (self._learnt, _ranks(self._hazards(chain)))
        return known[1][age_bin(age_s)]

    def _hazards(self, chain: tuple[Context, ...]) -> list[float]:
        hazards = [HAZARD] * BINS
        for context, trust in zip(chain, TRUST, strict=True):
            ended = self._tables.get(context)
            if ended is not None:
                later = accumulate(reversed(ended))  # in this bin or a later one, from the last bin on
                seen = [*later][::-1]
                hazards = [
                    (ended[each] + trust * hazards[each]) / (seen[each] + trust) for each in range(BINS)
                ]
        return hazards


def contexts(job: Job) -> tuple[Context, ...]:
    """From coarse to fine."""
    gpus = min(LARGE + 1, max(1, job.gang.gpu_units // GPU_UNIT))
    return ((), (gpus,), (job.queue, gpus), (job.queue, job.owner, gpus))


def _ranks(hazards: list[float]) -> list[float]:
    """For each bin at whose start a job is: the least expected time per expected end, over all horizons."""
    ranks = []
    for start in range(BINS):
        alive, spent_s, ended, best = 1.0, 0.0, 0.0, math.inf
        for each in range(start, BINS):
            width_s = EDGES[each + 1] - EDGES[each]
            ends = alive * hazards[each]
            spent_s += ends * 0.5 * width_s + (alive - ends) * width_s
            ended += ends
            alive -= ends
            if ended > 1e-12:
                best = min(best, spent_s / ended)
            if alive < 1e-4:
                break
        ranks.append(max(1.0, best))
    return ranks
