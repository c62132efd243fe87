"""A burst of jobs on a cluster without GPU nodes: what the autoscaler bought, beside the least that could do.

    python benchmarks/burst.py [--jobs 60] [--seed 1] [--seconds 40 120] [--limits] [--idle 5] [--boot 0]

`ray up` of cluster.local.yaml on this machine: Ray's own autoscaler and our provider; nodes are processes, GPUs are
logical, jobs sleep. 60 jobs at once: shares of a GPU, 1, 2, 4 and 8 GPUs, and a gang of two whole nodes. A node counts
from the moment when the provider was asked for it until its last process has gone, with all of its GPUs. The bound is
what the jobs held: no packing into nodes of any size buys less. Fails if a job is stuck or ran twice, or if a node, a
process or a file is left.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "providers"))

from local_cluster import LocalCluster, local_cluster  # the `ray up` of the tests

SHAPES: tuple[tuple[dict[str, Any], int], ...] = (
    ({"num_gpus": 0.5}, 6),
    ({"num_gpus": 1}, 26),
    ({"num_gpus": 2}, 12),
    ({"num_gpus": 4}, 10),
    ({"num_gpus": 8}, 5),
    ({"num_gpus": 16, "nodes": 2}, 1),
)
"""What a job asks for, and how many of 60 do."""
LOOK_S = 0.1
STUCK_S = 1800.0
"""Longer than all of it takes one after the other on the largest nodes."""


@dataclass
class Bought:
    """One node. Times in seconds on the monotonic clock."""

    type: str
    asked: float
    last: float


class Watch(threading.Thread):
    """Which nodes the provider has, by its own book, ten times a second."""

    def __init__(self, cluster: LocalCluster) -> None:
        super().__init__(daemon=True)
        self._provider = cluster.provider
        self._over = threading.Event()
        self.nodes: dict[str, Bought] = {}

    def run(self) -> None:
        while not self._over.wait(LOOK_S):
            now = time.monotonic()
            for name in self.workers():
                if name not in self.nodes:
                    tags = self._provider.node_tags(name)
                    self.nodes[name] = Bought(tags.get("ray-user-node-type", ""), now, now)
                self.nodes[name].last = now

    def workers(self) -> list[str]:
        return self._provider.non_terminated_nodes({"ray-node-type": "worker"})

    def end(self) -> None:
        self._over.set()
        self.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=(40, 120), help="the shortest and the longest job"
    )
    parser.add_argument(
        "--idle", type=float, default=5, help="how long a node is idle before it goes, in seconds"
    )
    parser.add_argument(
        "--boot", type=float, default=0, help="seconds that every node boots beyond what Ray takes"
    )
    parser.add_argument(
        "--limits", action="store_true", help="jobs have time limits, a quarter above what they take"
    )
    parser.add_argument("--timeline", action="store_true", help="GPUs bought and held, every 10 s")
    options = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with local_cluster("burst", boot_delay_s=options.boot) as cluster:
        config = yaml.safe_load(cluster.yaml.read_text())
        config["idle_timeout_minutes"] = options.idle / 60
        cluster.yaml.write_text(yaml.safe_dump(config))
        gpus = {
            name: kind["resources"].get("GPU", 0) for name, kind in config["available_node_types"].items()
        }
        os.environ |= cluster.environment
        cluster.up()
        watch = Watch(cluster)
        watch.start()
        began = time.monotonic()
        jobs = burst(cluster, options)
        took = time.monotonic() - began
        emptied_by = time.monotonic() + 60
        while watch.workers():
            if time.monotonic() > emptied_by:
                sys.exit(f"idle nodes have not gone: {watch.workers()}")
            time.sleep(LOOK_S)
        watch.end()
        cluster.down()
        if left := cluster.left():
            sys.exit(f"left behind: {left}")
    print_table(jobs, watch.nodes, gpus, took, timeline=options.timeline)


def burst(cluster: LocalCluster, options: argparse.Namespace) -> list[Any]:
    """Submit all at once and wait for all; their views."""
    import ray

    import rm

    random_ = random.Random(options.seed)
    shapes = [shape for shape, count in SHAPES for _ in range(count)]
    random_.shuffle(shapes)
    wanted = [shapes[number % len(shapes)] for number in range(options.jobs)]
    client = rm.connect(cluster.address)
    entries = []
    for number, shape in enumerate(wanted):
        seconds = random_.uniform(*options.seconds)
        entries.append({"entry": f"sleep {seconds:.1f}", "name": f"burst-{number}", **shape})
        if options.limits:
            entries[-1]["time_limit"] = 1.25 * seconds + 5
    jobs = client.submit_many(entries)
    stuck_at = time.monotonic() + STUCK_S
    while live := client.jobs(limit=1000):
        if time.monotonic() > stuck_at:
            sys.exit(f"stuck: {[(job.id, job.view().reason) for job in live]}")
        time.sleep(1)
    views = [job.view() for job in jobs]
    ray.shutdown()
    if wrong := [(each.id, each.status, each.attempts) for each in views if each.status != "SUCCEEDED"]:
        sys.exit(f"not succeeded: {wrong}")
    if again := [each.id for each in views if each.attempts != 1]:
        sys.exit(f"ran more than once: {again}")
    return views


def print_table(
    jobs: list[Any], nodes: dict[str, Bought], gpus: dict[str, int], took: float, *, timeline: bool
) -> None:
    held = sum((each.ended_at - each.started_at) * each.gpus for each in jobs)
    seconds: dict[str, float] = defaultdict(float)
    for each in nodes.values():
        seconds[each.type] += (each.last - each.asked) * gpus[each.type]
    table = Table(title=f"{len(jobs)} jobs from no GPU node to none, {took:.0f} s")
    for column in ("what", "nodes", "GPU-seconds", "× the bound"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row("held by jobs: the bound", "", f"{held:,.0f}", "1.00")
    for name in sorted(seconds):
        count = sum(each.type == name for each in nodes.values())
        table.add_row(f"bought: {name}", str(count), f"{seconds[name]:,.0f}", "")
    bought = sum(seconds.values())
    table.add_row("bought", str(len(nodes)), f"{bought:,.0f}", f"{bought / held:.2f}")
    if timeline:
        print_timeline(jobs, nodes, gpus)
    waits = sorted(each.started_at - each.submitted_at for each in jobs)
    table.add_row(f"waits: median {waits[len(waits) // 2]:.0f} s, longest {waits[-1]:.0f} s", "", "", "")
    Console(width=100).print(table)


def print_timeline(jobs: list[Any], nodes: dict[str, Bought], gpus: dict[str, int]) -> None:
    begun = min(each.submitted_at for each in jobs)
    to_wall = time.time() - time.monotonic()
    last = max(each.last + to_wall for each in nodes.values())
    for tick in range(0, int(last - begun) + 1, 10):
        at = begun + tick
        up = Counter(e.type for e in nodes.values() if e.asked + to_wall <= at <= e.last + to_wall)
        held = [each for each in jobs if each.started_at <= at < each.ended_at]
        waiting = sorted((each.gpus for each in jobs if each.started_at > at), reverse=True)
        bought, used = sum(gpus[name] * count for name, count in up.items()), sum(each.gpus for each in held)
        print(f"{tick:4d} s  {dict(sorted(up.items()))}: {bought} GPUs, {used:g} held, wait: {waiting}")


if __name__ == "__main__":
    main()
