"""How long a GPU is idle between two jobs, how long a job waits on an idle cluster, how many jobs pass in a second.

    python benchmarks/handover.py [--jobs 40] [--burst 1000] [--submissions 10000] [--rounds 3] [--keep-warm 2] [--json]

A Ray of its own: one node with 8 logical GPUs. The jobs are commands that print the time; what is measured is between
what one job prints last and what the next prints first, so it holds the end of a process and the start of another, the
ledger's commits, and all messages in between. It is measured twice: by the clock of bash, which is the user's process,
and by `date`, where one more program ends and another starts. Functions import torch and say when they have it. Bare
Ray does the same with a placement group, a task in it, and the group's removal; its rate is that of a task per job in a
group per job, 8 at a time. Needs torch and no GPU; touches no other Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
STAMP = "date +%s.%N"
OWN_STAMP = "echo $EPOCHREALTIME"
"""The time by bash itself, which is what runs the line: no program is started to tell it."""
GPUS = 8
BARE = 10
"""So many times bare Ray does it: it takes seconds each."""
BARE_BURST = 80
SINGLE = 500
WARM_UP = 24
"""So many jobs start the runners that the next ones find."""
POLLERS = 50
AT_ONCE = 5_000
"""The most that one step may hold, for the sake of other users."""
PRELOAD_S = 1.5
"""By then an interpreter has imported torch. A stand waits for the next job for longer than that."""
REPORTED_S = 0.5
"""By then Ray has noticed that the last group's GPUs are free."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=40, help="jobs in a row, for each of the first two rows")
    parser.add_argument("--burst", type=int, default=1000, help="no-op jobs that are submitted at once")
    parser.add_argument("--submissions", type=int, default=10_000, help="held jobs of one submission")
    parser.add_argument("--rounds", type=int, default=3, help="of the rates, whose median is printed")
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
        full = between_jobs(client, options.jobs, OWN_STAMP)
        dated = between_jobs(client, options.jobs, STAMP)
        idle = from_submission(client, options.jobs)
        functions = from_submission_of_a_function(client, options.jobs)
        single, many, cold, warm, polled = [], [], [], [], []
        for _ in range(options.rounds):
            single.append(one_by_one(client))
            many.append(many_at_once(client, options.submissions))
            time.sleep(options.keep_warm + 2)
            cold.append(burst(client, options.burst))
            warm.append(burst(client, options.burst))
            with polling(cluster.address):
                burst(client, WARM_UP)
                polled.append(burst(client, options.burst))
        time.sleep(options.keep_warm + 2)
        bare_gaps, bare_starts = bare_ray(run_command)
        _, bare_functions = bare_ray(run_function)
        bare_rate = bare_burst()
        return [
            row("a job ends → the next one's first line, full cluster", full, bare_gaps, 15),
            row("the same, where the lines are `date`", dated, bare_gaps, 15),
            row("submit → first line, idle cluster, command", idle, bare_starts, 30),
            row("submit → torch imported, idle cluster, function", functions, bare_functions, 80),
            rate(f"no-op jobs on {GPUS} GPUs, {options.burst} at once", warm, 140, bare_rate),
            rate("the same where no runner is there yet", cold, 140),
            rate(
                f"the same while {POLLERS} clients ask for the status of a job",
                polled,
                0.9 * statistics.median(warm),
            ),
            rate("durable submissions, one by one", single, 450),
            rate(f"durable submissions, {options.submissions} in steps of {AT_ONCE}", many, 5_000),
        ]
    finally:
        ray.shutdown()
        cluster.shutdown()


def between_jobs(client: Any, count: int, stamp: str) -> list[float]:
    """Seconds between jobs that each need all GPUs and are all submitted before the first ends."""
    jobs = client.submit_many([{"entry": f"{stamp}; sleep 0.2; {stamp}", "num_gpus": GPUS}] * count)
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


def from_submission_of_a_function(client: Any, count: int) -> list[float]:
    """The same for a function, until it has torch. The first ones are left out: they tell what to preload."""

    def imported() -> float:
        import torch

        return time.time() + 0 * torch.zeros(1).item()

    waits = []
    for number in range(count + 2):
        began = time.time()
        waits.append(client.submit(imported, num_gpus=1).result(60) - began)
        if number == 1:
            time.sleep(PRELOAD_S)
            client.submit(imported, num_gpus=1).result(60)
    return waits[2:]


def one_by_one(client: Any) -> float:
    """Submissions per second. Held, so that nothing else is measured."""
    began = time.monotonic()
    for _ in range(SINGLE):
        client.submit("true", num_gpus=1, hold=True)
    per_s = SINGLE / (time.monotonic() - began)
    client.cancel_all()
    return per_s


def many_at_once(client: Any, count: int) -> float:
    """The same for so many at once."""
    began = time.monotonic()
    for part in range(0, count, AT_ONCE):
        client.submit_many([{"entry": "true", "num_gpus": 1}] * min(AT_ONCE, count - part), hold=True)
    per_s = count / (time.monotonic() - began)
    client.cancel_all()
    return per_s


@contextlib.contextmanager
def polling(address: str) -> Iterator[None]:
    """POLLERS clients, in a process of their own, that each ask for the status of the newest job every second."""
    code = f"import sys; sys.path.insert(0, {str(REPO / 'benchmarks')!r}); import handover; handover.poll({address!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def poll(address: str) -> None:
    """Until the process is ended."""
    import rm

    client = rm.connect(address)
    job = client.submit("true", num_gpus=1)

    def ask() -> None:
        while True:
            _ = job.status
            time.sleep(1)

    for _ in range(POLLERS):
        threading.Thread(target=ask, daemon=True).start()
    print("polling", flush=True)
    threading.Event().wait()


def burst(client: Any, count: int) -> float:
    """Jobs per second from the first submission to the last end. To ask for each one's end takes another second."""
    began = time.time()
    jobs = client.submit_many([{"entry": "true", "num_gpus": 1}] * count)
    ends = [job.wait(300).ended_at for job in reversed(jobs)]
    return count / (max(ends) - began)


def run_command() -> tuple[float, float]:
    out = subprocess.run(f"{STAMP}; {STAMP}", shell=True, capture_output=True, check=True, text=True)
    first, last = out.stdout.split()
    return float(first), float(last)


def run_function() -> tuple[float, float]:
    import torch

    now = time.time() + 0 * torch.zeros(1).item()
    return now, now


def bare_ray(work: Callable[[], tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The same without rm: a group for all GPUs, a task in it, its removal. Gaps, and waits on an idle cluster."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    task = ray.remote(num_cpus=0, num_gpus=GPUS)(
        work
    )  # by which Ray starts a process for each, as for any GPU task

    def once() -> tuple[float, float, float]:
        began = time.time()
        group = placement_group([{"GPU": GPUS}])
        placed = task.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group))
        first, end = ray.get(placed.remote())
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


def bare_burst() -> float:
    """Jobs per second with a group, a task that starts a process, and the group's removal for each; 8 at a time."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote(num_cpus=0, num_gpus=1)
    def work() -> None:
        subprocess.run("true", shell=True, check=True)

    def once(_: int) -> None:
        group = placement_group([{"GPU": 1}])
        ray.get(work.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group)).remote())
        remove_placement_group(group)

    began = time.monotonic()
    with ThreadPoolExecutor(GPUS) as threads:
        list(threads.map(once, range(BARE_BURST)))
    return BARE_BURST / (time.monotonic() - began)


def rate(what: str, rounds: list[float], target: float, bare: float | None = None) -> dict[str, Any]:
    return {
        "what": what,
        "per_s": statistics.median(rounds),
        "lowest": min(rounds),
        "highest": max(rounds),
        "target": target,
        "bare_ray": bare,
    }


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
        if "median_ms" in each:
            faster = each["bare_ray_ms"] / each["median_ms"]
            print(
                f"| {each['what']} | {each['median_ms']:.0f} | {each['p95_ms']:.0f} | {each['bare_ray_ms']:.0f} "
                f"| {faster:.0f} | {each['target_ms']:g} |"
            )
    print("\n| what | per second | lowest to highest | bare Ray | target |")
    print("| --- | --- | --- | --- | --- |")
    for each in rows:
        if "per_s" in each:
            bare = "" if each["bare_ray"] is None else f"{each['bare_ray']:.0f}"
            spread = f"{each['lowest']:.0f} to {each['highest']:.0f}"
            print(f"| {each['what']} | {each['per_s']:.0f} | {spread} | {bare} | {each['target']:.0f} |")


if __name__ == "__main__":
    main()
