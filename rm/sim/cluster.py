"""What a trace is replayed on: pools of equal nodes, for everybody or one per queue, fixed or growing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rm.core.model import GPU_TYPE
from rm.errors import Infeasible, InvalidSpec
from rm.sim.trace import TraceJob

SHARED = ""
"""The name of the one pool that takes every job, whatever its queue."""
MOST_NODES = 1_000_000
POOL = "rm.sim/pool"
"""The label of nodes that serve one queue alone."""


@dataclass(frozen=True, slots=True)
class Pool:
    """`nodes` equal nodes for the jobs of the queue `name`, or for all jobs if the name is SHARED.

    `gpu_type`: "" where it doesn't matter. `least`: None where all nodes are always there; else so many are, and
    more of them, up to `nodes`, come and go with the demand.
    """

    name: str
    nodes: int
    gpus_per_node: int
    gpu_type: str = ""
    least: int | None = None

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class SimCluster:
    """The pools. Either all are SHARED, or each is of a queue of the trace; those of one name differ in GPU type.

    A job stays on the nodes of one name.
    """

    pools: tuple[Pool, ...]

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)

    @property
    def grows(self) -> bool:
        return any(pool.least is not None for pool in self.pools)

    @property
    def typed(self) -> bool:
        return any(pool.gpu_type for pool in self.pools)

    def serves(self, pool: Pool, queue: str) -> bool:
        """Whether the queue's jobs may use the pool's nodes."""
        return pool.name in (SHARED, queue)

    def label_of(self, name: str) -> tuple[tuple[str, str], ...]:
        """What the nodes of one name carry."""
        return () if name == SHARED else ((POOL, name),)

    def labelled(self) -> Iterator[tuple[Pool, tuple[tuple[str, str], ...]]]:
        """Each pool with the labels of its nodes."""
        for pool in self.pools:
            kind = ((GPU_TYPE, pool.gpu_type),) if pool.gpu_type else ()
            yield pool, (*kind, *self.label_of(pool.name))

    def split(self, jobs: Sequence[TraceJob]) -> list[tuple[Pool, list[TraceJob]]]:
        """The pools of each name as one, at their largest, with their jobs in the order given.

        Raises InvalidSpec for a job whose queue has no nodes, Infeasible for one larger than its whole pool: it
        would wait for ever, and under a strict order everybody behind it too.
        """
        pools: dict[str, Pool] = {}
        for pool in self.pools:
            nodes = pool.nodes + (pools[pool.name].nodes if pool.name in pools else 0)
            pools[pool.name] = Pool(pool.name, nodes, pool.gpus_per_node)
        by_name: dict[str, list[TraceJob]] = {name: [] for name in pools}
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
        for pool in pools.values():
            _refuse_oversized(pool, by_name[pool.name])
        return [(pool, by_name[pool.name]) for pool in pools.values()]


def parse_nodes(text: str, gpus_per_node: int, *, grows: bool = False) -> SimCluster:
    """The cluster that `--nodes` or, where it `grows`, `--autoscale` names. Raises InvalidSpec.

    `47`: so many nodes for all queues. `vcvGl=20,vcvlY=2`: nodes of their own. `40:A100,7:V100`: of GPU types. If it
    grows, each count is a range: `4:47`.
    """
    field, example = ("autoscale", "4:47") if grows else ("nodes", "47")
    form = ("([0-9]{1,9}):" if grows else "()") + r"([0-9]{1,9})(?::([^\s:=]+))?"
    if gpus_per_node < 1:
        raise InvalidSpec(f"gpus_per_node: {gpus_per_node} is not at least 1", field="gpus_per_node")
    pools: dict[tuple[str, str], Pool] = {}
    for part in text.split(","):
        name, equals, rest = part.rpartition("=")
        name = name.strip()
        found = re.fullmatch(form, rest.strip())
        least, most, gpu_type = found.groups(default="") if found else ("", "0", "")
        ordered = bool(least) == grows and int(least or 0) <= int(most) <= MOST_NODES
        if not (ordered and int(most)) or bool(equals) != bool(name):
            raise InvalidSpec(
                f"{field}: {part.strip()!r} is no {'range' if grows else 'count'} of nodes; say {example}, or "
                f"a={example},b={example} for queues with nodes of their own, or {example}:A100 for a GPU type",
                field=field,
            )
        if (name, gpu_type) in pools:
            raise InvalidSpec(f"{field}: {name or part.strip()!r} is given twice", field=field)
        pools[name, gpu_type] = Pool(name, int(most), gpus_per_node, gpu_type, int(least) if grows else None)
    if len({name == SHARED for name, _ in pools}) > 1:
        raise InvalidSpec(f"{field}: either nodes for all queues, or for each its own", field=field)
    if len({bool(gpu_type) for _, gpu_type in pools}) > 1:
        raise InvalidSpec(f"{field}: either all nodes have a GPU type, or none", field=field)
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
