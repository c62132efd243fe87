"""How long the scheduler takes to decide, on clusters of up to 10,000 nodes. Pure core: no Ray, no ledger.

    python benchmarks/scheduler.py [--traces DIR] [--plot growth.png] [--events 300] [--only event,fill,growth,replay]

event    one event at a time on a full cluster with 100,000 waiting jobs; what is measured is applying the event,
         the cycle, and applying its decisions. And a cold cycle: the first one after a start, all notes empty
fill     10,000 waiting jobs on 1,000 empty nodes, in one cycle
growth   the same events with more jobs and with more nodes
replay   the whole Philly trace (philly.csv.gz in DIR) on 47 nodes of 8 GPUs, under the default policy

Exit code 1 where a figure misses its target, which the table names.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rm.core.cycle import schedule
from rm.core.events import (
    JobAdmitted,
    JobSubmitted,
    NodeJoined,
    PlacementReady,
    PlacementReleased,
    RunExited,
    RunStarted,
    StopRequested,
)
from rm.core.model import Gang, Job, Kind, Outcome, Status
from rm.core.policy import ANY, Order, Policy, QueuePolicy
from rm.core.resources import GPU_UNIT, Bundle
from rm.core.state import ClusterState

GPUS = 8
SHAPES = [
    Gang(Bundle(gpus * GPU_UNIT, cpu * gpus), count)
    for gpus, counts in ((1, 5), (2, 5), (4, 5), (8, 10))
    for count in range(1, counts + 1)
    for cpu in (0, 500)
]
"""50 of them: from one GPU to ten whole nodes, with and without a wish for CPUs."""
DONE = Outcome(Status.SUCCEEDED)
STOPPED = Outcome(Status.FAILED, "stopped", signal=15)


class Load:
    """A state filled with nodes, running and waiting jobs, all drawn from one seed."""

    def __init__(
        self, nodes: int, queues: int, *, gpus: int = GPUS, quotas: bool = True, limits: bool = True
    ) -> None:
        self.rng = random.Random(1)
        share = nodes * gpus * GPU_UNIT // queues
        self.queues = [f"q{number}" for number in range(queues)]
        policy = Policy(
            queues={
                name: QueuePolicy(name, nominal={ANY: share} if quotas else None) for name in self.queues
            },
            default_queue=self.queues[0],
            order=Order.FAIR,
        )
        self.state = ClusterState(policy)
        self.limits = limits
        self.now = 0.0
        self.seq = 0
        self.running: list[str] = []
        self.stopping: dict[str, None] = {}
        for number in range(nodes):
            self.state.apply(NodeJoined(0.0, f"n{number}", f"n{number}", gpus, 64_000, 2**39))

    def submit(self, *, gang: Gang | None = None) -> None:
        self.seq += 1
        queue = self.rng.choice(self.queues)
        job = Job(
            f"j{self.seq}",
            self.seq,
            "job",
            f"{queue}-user{self.rng.randrange(3)}",
            Kind.COMMAND,
            gang or self.rng.choice(SHAPES),
            self.now,
            queue=queue,
            priority=self.rng.choice((0, 0, 0, 100)),
            time_limit_s=self.rng.choice((3_600.0, 36_000.0, 360_000.0)) if self.limits else None,
        )
        self.state.apply(JobSubmitted(self.now, job))

    def decide(self) -> int:
        """One cycle, its decisions applied; the jobs admitted run at once. Returns how many.

        Whoever is evicted is a job that ends with a later event.
        """
        admitted = 0
        for event in schedule(self.state, self.now).events:
            self.state.apply(event)
            if isinstance(event, StopRequested):
                self.stopping[event.job_id] = None
            if isinstance(event, JobAdmitted):
                admitted += 1
                self.running.append(event.job_id)
                self.state.apply(PlacementReady(self.now, event.job_id, event.attempt))
                self.state.apply(RunStarted(self.now, event.job_id, event.attempt))
        self.state.take_changes()
        return admitted

    def fill(self) -> None:
        """Jobs until nothing fits any more."""
        while True:
            for _ in range(len(self.state.nodes)):
                self.submit()
            if not self.decide():
                return

    def a_job_ends(self) -> None:
        """One that is being stopped, where there is one, or any other."""
        outcome = STOPPED if self.stopping else DONE
        job_id = next(iter(self.stopping)) if self.stopping else self.rng.choice(self.running)
        self.stopping.pop(job_id, None)
        self.running.remove(job_id)
        job = self.state.jobs[job_id]
        self.state.apply(RunExited(self.now, job.id, job.attempts, outcome))
        self.state.apply(PlacementReleased(self.now, job.id, job.attempts))


def loaded(nodes: int, waiting: int, queues: int, *, quotas: bool = True) -> Load:
    """A full cluster with so many waiting jobs, which cycles have looked at until nobody was evicted any more."""
    load = Load(nodes, queues, quotas=quotas)
    load.fill()
    while len(load.state.pending) < waiting:
        load.submit()
    for _ in range(100):
        load.now += 60.0
        load.decide()
        if not load.stopping:
            break
        while load.stopping:
            load.a_job_ends()
    while load.state.books.unchecked:
        load.decide()
    return load


def event_times_s(load: Load, events: int) -> list[float]:
    """Seconds from each event to its decisions, ascending. A job ends and another comes, in turn."""
    times: list[float] = []
    for number in range(events):
        load.now += 1.0
        began = time.perf_counter()
        if number % 2:
            load.submit()
        else:
            load.a_job_ends()
        load.decide()
        times.append(time.perf_counter() - began)
    return sorted(times)


def cold_s(load: Load) -> float:
    """A cycle that has nothing to build on: the reasons of all jobs are forgotten too, as before the first one."""
    state = ClusterState(load.state.policy)
    jobs = [replace(job, reason=None) for job in load.state.jobs.values()]
    state.restore(jobs)
    for node in load.state.nodes.values():
        state.apply(
            NodeJoined(
                load.now, node.id, node.name, node.gpu_slots, node.cpu_milli, node.memory_bytes, node.labels
            )
        )
    began = time.perf_counter()
    schedule(state, load.now)
    return time.perf_counter() - began


class Report:
    """Rows of measured and wanted."""

    def __init__(self) -> None:
        self.table = Table(box=None, header_style="bold")
        for title in ("WHAT", "MEASURED", "TARGET", ""):
            self.table.add_column(title, justify="left" if title == "WHAT" else "right")
        self.missed = 0

    def add(self, what: str, value: float, target: float | None, unit: str) -> None:
        over = target is not None and value > target
        self.missed += over
        wanted = "" if target is None else f"≤ {target:,g} {unit}"
        self.table.add_row(what, f"{value:,.1f} {unit}", wanted, "MISSED" if over else "")


def at(ascending: list[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]


def measure_events(report: Report, events: int) -> None:
    for quotas in (False, True):
        load = loaded(10_000, 100_000, 200, quotas=quotas)
        rules = "queues that own nothing" if not quotas else "queues with quotas, reclaiming"
        gc.collect()
        gc.freeze()
        times = event_times_s(load, events)
        report.add(
            f"10,000 × {GPUS} GPUs, 100,000 waiting, {rules}: one event, median",
            at(times, 0.5) * 1000,
            10,
            "ms",
        )
        report.add("  P99", at(times, 0.99) * 1000, 50, "ms")
        report.add("  longest", times[-1] * 1000, None, "ms")
        report.add("  cold cycle", cold_s(load), 1, "s")
        gc.unfreeze()


def measure_fill(report: Report) -> None:
    one, half = Gang(Bundle(GPU_UNIT)), Gang(Bundle(GPU_UNIT // 2))
    for what, gpus, gangs in (
        ("whole and half GPUs on 1,000 empty nodes of 8", 8, (one, half)),
        ("1 or 2 GPUs on 1,000 empty nodes of 16", 16, (one, one, Gang(Bundle(2 * GPU_UNIT)))),
    ):
        load = Load(1_000, 20, gpus=gpus, quotas=False, limits=False)
        for _ in range(10_000):
            load.submit(gang=load.rng.choice(gangs))
        gc.collect()
        began = time.perf_counter()
        plan = schedule(load.state, load.now)
        took_s = time.perf_counter() - began
        admitted = sum(isinstance(each, JobAdmitted) for each in plan.events)
        report.add(f"10,000 jobs of {what}: {admitted:,} placed", took_s, 1, "s")


def measure_growth(events: int, plot: Path | None) -> Table:
    table = Table(box=None, header_style="bold")
    for title in ("NODES", "WAITING", "MEDIAN ms", "P99 ms", "COLD s"):
        table.add_column(title, justify="right")
    curves: dict[str, list[tuple[int, float]]] = {
        "waiting jobs on 2,000 nodes": [],
        "nodes, 20,000 waiting jobs": [],
    }
    by_jobs, by_nodes = curves.values()
    for nodes, waiting, curve in (
        *((2_000, count, by_jobs) for count in (10_000, 20_000, 50_000, 100_000)),
        *((count, 20_000, by_nodes) for count in (500, 1_000, 2_000, 5_000, 10_000)),
    ):
        load = loaded(nodes, waiting, 200)
        gc.collect()
        times = event_times_s(load, events)
        median_ms = at(times, 0.5) * 1000
        table.add_row(
            f"{nodes:,}", f"{len(load.state.pending):,}", f"{median_ms:.2f}", f"{at(times, 0.99) * 1000:.2f}",
            f"{cold_s(load):.2f}",
        )  # fmt: skip
        curve.append((waiting if curve is by_jobs else nodes, median_ms))
    if plot is not None:
        draw(plot, curves)
    return table


def draw(path: Path, curves: dict[str, list[tuple[int, float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for title, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=title)
    axes.set(xlabel="jobs, or nodes", ylabel="one event, median ms", xscale="log", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)


def measure_replay(report: Report, traces: Path) -> None:
    from rm.sim.cluster import parse_nodes
    from rm.sim.policies import policy_named
    from rm.sim.trace import read_trace

    jobs = read_trace(traces / "philly.csv.gz")
    began, cpu_began = time.perf_counter(), time.process_time()
    policy_named("rm-default").replay(jobs, parse_nodes("47", 8))
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    report.add(f"Philly, {len(jobs):,} jobs on 47 × 8 GPUs, rm-default", took_s, 60, "s")
    report.add("  processor time of that", cpu_s, None, "s")
    report.add("  peak memory of this process", peak_mib(), 600, "MiB")


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, metavar="DIR")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--only", default="replay,event,fill,growth", metavar="PARTS")
    options = parser.parse_args()
    parts = set(options.only.split(","))
    console = Console(width=None if sys.stdout.isatty() else 140)
    report = Report()
    # The replay comes first: its peak memory must be its own.
    if "replay" in parts and options.traces is not None:
        measure_replay(report, options.traces)
    if "event" in parts:
        measure_events(report, options.events)
    if "fill" in parts:
        measure_fill(report)
    console.print(report.table)
    if "growth" in parts:
        console.print(measure_growth(max(20, options.events // 3), options.plot))
    print(f"{report.missed} targets are missed" if report.missed else "all targets are met")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
