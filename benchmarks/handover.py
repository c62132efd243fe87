"""How long a GPU is idle between two jobs, and how long a job waits on an idle cluster. Beside bare Ray, in one run.

    python benchmarks/handover.py [--jobs 40] [--burst 400] [--keep-warm 2] [--json]

A Ray of its own: one node with 8 logical GPUs. The jobs are commands that print the time; what is measured is between
what one job prints last and what the next prints first, so it holds the end of a process and the start of another, the
ledger's commits, and all messages in between. Bare Ray does the same with a placement group, a task in it, and the
group's removal. Needs no GPU; touches no other Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
STAMP = "date +%s.%N"
GPUS = 8
BARE = 10
"""So many times bare Ray does it: it takes seconds each."""
REPORTED_S = 0.5
"""By then Ray has noticed that the last group's GPUs are free."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=40, help="jobs in a row, for each of the first two rows")
    parser.add_argument("--burst", type=int, default=400, help="no-op jobs that are submitted at once")
    parser.add_argument("--keep-warm", type=float, default=2.0, help="RM_KEEP_WARM_S")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rm-bench-") as home:
        rows = measure(Path(home), options)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print_table(rows)


def measure(home: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    os.environ |= {
        "RAY_TMPDIR": str(home),
        "RAY_AUTH_MODE": "disabled",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    import ray
    from ray.cluster_utils import Cluster

    import rm
    from rm.spec import Config

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 8,
            "num_gpus": GPUS,
            "object_store_memory": 100 * 2**20,
            "include_dashboard": False,
            "_system_config": {"raylet_report_resources_period_milliseconds": 50},
        },
    )
    try:
        config = Config(
            home=home / "rm", checkpoint_root=str(home / "checkpoints"), keep_warm_s=options.keep_warm
        )
        client = rm.connect(cluster.address, config=config)
        client.submit("true", num_gpus=GPUS).wait(120)
        full = between_jobs(client, options.jobs)
        idle = from_submission(client, options.jobs)
        rate = burst(client, options.burst)
        time.sleep(options.keep_warm + 2)
        bare_gaps, bare_starts = bare_ray()
        return [
            row("a job ends → the next one's first line, full cluster", full, bare_gaps, 15),
            row("submit → first line, idle cluster", idle, bare_starts, 30),
            {
                "what": f"no-op jobs on {GPUS} GPUs, {options.burst} at once",
                "jobs_per_s": rate,
                "target": 140,
            },
        ]
    finally:
        ray.shutdown()
        cluster.shutdown()


def between_jobs(client: Any, count: int) -> list[float]:
    """Seconds between jobs that each need all GPUs and are all submitted before the first ends."""
    jobs = client.submit_many([{"entry": f"{STAMP}; sleep 0.2; {STAMP}", "num_gpus": GPUS}] * count)
    for job in jobs:
        job.wait(120)
    times = [[float(each) for each in job.logs().split()] for job in jobs]
    return [after[0] - before[1] for before, after in pairwise(times)]


def from_submission(client: Any, count: int) -> list[float]:
    """Seconds from the call of `submit` to the first line; each job is submitted when the last has ended."""
    waits = []
    for _ in range(count):
        began = time.time()
        job = client.submit(STAMP, num_gpus=1)
        job.wait(60)
        waits.append(float(job.logs()) - began)
    return waits[1:]


def burst(client: Any, count: int) -> float:
    """Jobs per second from the first submission to the last end."""
    began = time.monotonic()
    jobs = client.submit_many([{"entry": "true", "num_gpus": 1}] * count)
    for job in reversed(jobs):
        job.wait(300)
    return count / (time.monotonic() - began)


def bare_ray() -> tuple[list[float], list[float]]:
    """The same two figures without rm: a group for all GPUs, a task in it that runs a command, the group's removal."""
    import subprocess

    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote(num_cpus=0, num_gpus=GPUS)
    def work() -> tuple[float, float]:
        out = subprocess.run(f"{STAMP}; {STAMP}", shell=True, capture_output=True, check=True, text=True)
        first, last = out.stdout.split()
        return float(first), float(last)

    def once() -> tuple[float, float, float]:
        began = time.time()
        group = placement_group([{"GPU": GPUS}])
        task = work.options(
            num_cpus=0, num_gpus=GPUS, scheduling_strategy=PlacementGroupSchedulingStrategy(group)
        )
        first, end = ray.get(task.remote())
        remove_placement_group(group)
        return began, first, end

    row = [once() for _ in range(BARE)]
    gaps = [after[1] - before[2] for before, after in pairwise(row)]
    starts = []
    for _ in range(BARE):
        time.sleep(REPORTED_S)
        began, first, _ = once()
        starts.append(first - began)
    return gaps, starts


def row(what: str, ours: list[float], bare: list[float], target_ms: float) -> dict[str, Any]:
    ordered = sorted(ours)
    return {
        "what": what,
        "median_ms": 1000 * statistics.median(ours),
        "p95_ms": 1000 * ordered[int(0.95 * (len(ordered) - 1))],
        "bare_ray_ms": 1000 * statistics.median(bare),
        "target_ms": target_ms,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| what | median ms | P95 ms | bare Ray ms | times faster | target ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for each in rows:
        if "median_ms" not in each:
            print(f"\n{each['what']}: {each['jobs_per_s']:.0f} jobs/s (target {each['target']})")
            continue
        faster = each["bare_ray_ms"] / each["median_ms"]
        print(
            f"| {each['what']} | {each['median_ms']:.0f} | {each['p95_ms']:.0f} | {each['bare_ray_ms']:.0f} "
            f"| {faster:.0f} | {each['target_ms']:g} |"
        )


if __name__ == "__main__":
    main()
