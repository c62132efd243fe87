"""What a trace is replayed on: pools of equal nodes, one for everybody or one per queue."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rm.errors import Infeasible, InvalidSpec
from rm.sim.trace import TraceJob

SHARED = ""
"""The name of the one pool that takes every job, whatever its queue."""
MOST_NODES = 1_000_000


@dataclass(frozen=True, slots=True)
class Pool:
    """`nodes` equal nodes for the jobs of the queue `name`, or for all jobs if the name is SHARED."""

    name: str
    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class SimCluster:
    """The pools; a job never crosses them. Either one SHARED pool, or one per queue of the trace."""

    pools: tuple[Pool, ...]

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)

    def split(self, jobs: Sequence[TraceJob]) -> list[tuple[Pool, list[TraceJob]]]:
        """Each pool with its jobs, in the order given.

        Raises InvalidSpec for a job whose queue has no nodes, Infeasible for one larger than its whole pool: it
        would wait for ever, and under a strict order everybody behind it too.
        """
        by_name: dict[str, list[TraceJob]] = {pool.name: [] for pool in self.pools}
        shared = by_name.get(SHARED)
        for job in jobs:
            own = shared if shared is not None else by_name.get(job.queue)
            if own is None:
                raise InvalidSpec(
                    f"nodes: queue {job.queue!r} of job {job.job_id} has no nodes; "
                    f"there are nodes for {', '.join(by_name)}",
                    field="nodes",
                )
            own.append(job)
        for pool in self.pools:
            _refuse_oversized(pool, by_name[pool.name])
        return [(pool, by_name[pool.name]) for pool in self.pools]


def parse_nodes(text: str, gpus_per_node: int) -> SimCluster:
    """`47`: so many nodes for all queues. `vcvGl=20,vcvlY=2`: nodes of their own. Raises InvalidSpec."""
    if gpus_per_node < 1:
        raise InvalidSpec(f"gpus_per_node: {gpus_per_node} is not at least 1", field="gpus_per_node")
    pools: dict[str, Pool] = {}
    for part in text.split(","):
        name, equals, count = part.rpartition("=")
        name = name.strip()
        nodes = int(count) if re.fullmatch(r"\s*[0-9]{1,9}\s*", count) else 0
        if not 1 <= nodes <= MOST_NODES or bool(equals) != bool(name):
            raise InvalidSpec(
                f"nodes: {part.strip()!r} is no count of nodes; say 47, or vcvGl=20,vcvlY=2 for queues with "
                "nodes of their own",
                field="nodes",
            )
        if name in pools:
            raise InvalidSpec(f"nodes: {name or part.strip()!r} is given twice", field="nodes")
        pools[name] = Pool(name, nodes, gpus_per_node)
    if SHARED in pools and len(pools) > 1:
        raise InvalidSpec("nodes: either one count for all queues, or one for each", field="nodes")
    return SimCluster(tuple(pools.values()))


def whole_gpus(job: TraceJob) -> int:
    """Devices that it takes where devices aren't shared: a share of one is one."""
    return math.ceil(job.num_gpus)


def _refuse_oversized(pool: Pool, jobs: Iterable[TraceJob]) -> None:
    oversized = [job for job in jobs if whole_gpus(job) > pool.gpus]
    if not oversized:
        return
    largest = max(oversized, key=whole_gpus)
    where = f"the nodes of queue {pool.name!r} have" if pool.name else "the cluster has"
    least = math.ceil(whole_gpus(largest) / pool.gpus_per_node)
    raise Infeasible(
        f"num_gpus: job {largest.job_id} needs {whole_gpus(largest)} GPUs, {where} {pool.gpus} "
        f"({len(oversized)} of the trace's jobs are too large); {least} nodes would hold it",
        field="num_gpus",
    )
