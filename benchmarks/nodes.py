"""Whether a job costs the head more when the cluster has more nodes.

    python benchmarks/nodes.py [--nodes 1 4 16] [--jobs 200] [--at-once 96] [--json]

For each size a Ray of its own with so many local raylets, each with 8 logical GPUs, and one allocator. On each, no-op
jobs of one shape at a time, all submitted at once: of 1 GPU, of a whole node, and gangs over several nodes as far as
there are any. Printed is the processor time that the head spends on a job: allocator, store and GCS. Processes of the
jobs and their runners are the nodes' business; here they share the cores, so that jobs per second say nothing of nodes.
Each runner is a process of some 70 MB, so no more than `--at-once` bundles run at a time, then the next.
What a decision costs on 10,000 nodes is told by `benchmarks/scheduler.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

GPUS = 8
SHAPES = (1, 8, 16, 32, 64)
"""GPUs of a job: from 16 on a gang of several nodes."""
LOGS_S = 0.8
"""By then the ends of short logs are in the store."""
WARM_UP = 2
"""So many times as many jobs as fit at once run before anything is measured: runners have started then."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--jobs", type=int, default=200, help="jobs of 1 GPU; of n GPUs a share of them, 50 at least"
    )
    parser.add_argument("--at-once", type=int, default=96, help="bundles that run at a time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [each for count in options.nodes for each in measure(count, options.jobs, options.at_once)]
    print(json.dumps(rows, indent=2) if options.json else table(rows))


def measure(count: int, jobs: int, bundles: int) -> list[dict[str, Any]]:
    with (
        tempfile.TemporaryDirectory(prefix="rm-n-", ignore_cleanup_errors=True) as home,
        cluster(count, home) as client,
    ):
        rows = []
        for gpus in SHAPES:
            room = count * GPUS // gpus
            if not room:
                continue
            at_once = min(room, bundles // max(1, gpus // GPUS))
            # Where more than that would fit, they come in turns.
            turn = at_once if at_once < room else None
            shape = {"num_gpus": gpus} if gpus <= GPUS else {"nodes": gpus // GPUS, "gpus_per_node": GPUS}
            run(client, WARM_UP * at_once, shape, turn)
            time.sleep(LOGS_S)
            number = max(50, jobs // gpus, WARM_UP * at_once)
            before, began = head_s(), time.monotonic()
            run(client, number, shape, turn)
            wall_s = time.monotonic() - began
            time.sleep(LOGS_S)
            spent = {name: after - before[name] for name, after in head_s().items()}
            per_job = {name: 1000 * seconds / number for name, seconds in spent.items()}
            rows.append(
                {"nodes": count, "gpus": gpus, "jobs": number, "per_s": number / wall_s, "ms": per_job}
            )
        return rows


@contextmanager
def cluster(count: int, home: str) -> Iterator[Any]:
    """A client of a new allocator on so many nodes; a GPU-less head beside them."""
    os.environ |= {
        "RAY_TMPDIR": home,
        "RAY_AUTH_MODE": "disabled",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "REPORTER_UPDATE_INTERVAL_MS": "60000",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    import ray
    from ray.cluster_utils import Cluster

    import rm
    from rm.spec import Config

    node = {
        "num_cpus": 1,  # Ray starts as many idle workers on each node
        "object_store_memory": 80 * 2**20,
        "include_dashboard": False,
        "include_log_monitor": False,
        "no_monitor": True,
    }
    system = {"raylet_report_resources_period_milliseconds": 50}
    local = Cluster(initialize_head=True, head_node_args={**node, "num_gpus": 0, "_system_config": system})
    try:
        for _ in range(count):
            local.add_node(**node, num_gpus=GPUS)
        config = Config(
            home=Path(home) / "rm",
            checkpoint_root=f"{home}/checkpoints",
            keep_warm_s=20,
            audit_every_s=3_600,  # it starts a process on each node, and all of them are this machine
        )
        client = rm.connect(local.address, config=config)
        while sum(each.free_gpus for each in client.nodes()) < count * GPUS:
            time.sleep(0.2)
        yield client
    finally:
        ray.shutdown()
        local.shutdown()


def run(client: Any, number: int, shape: dict[str, int], turn: int | None) -> None:
    while number:
        some = min(number, turn or number)
        jobs = client.submit_many(["true"] * some, **shape)
        for job in reversed(jobs):
            status = job.wait(600).status
            assert status == "SUCCEEDED", status
        number -= some


def head_s() -> dict[str, float]:
    """Processor seconds of the head's processes so far."""
    from ray._private.state import actors

    pids = {each["Name"]: each["Pid"] for each in actors().values() if each["State"] == "ALIVE"}
    ours = {name: psutil.Process(pids[name]) for name in ("allocator", "store")}
    me = psutil.Process()
    (gcs,) = [each for each in me.children(recursive=True) if each.name() == "gcs_server"]
    times = {name: each.cpu_times() for name, each in {**ours, "gcs": gcs}.items()}
    return {name: each.user + each.system for name, each in times.items()}


def table(rows: list[dict[str, Any]]) -> str:
    # Of each shape, on the fewest nodes that can run it.
    base = {each["gpus"]: sum(each["ms"].values()) for each in reversed(rows)}
    lines = [
        "| nodes | GPUs of a job | jobs | allocator, ms a job | store | GCS | all | beside fewest nodes | jobs/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in rows:
        ms, total = each["ms"], sum(each["ms"].values())
        ratio = f"{total / base[each['gpus']]:.2f}"
        lines.append(
            f"| {each['nodes']} | {each['gpus']} | {each['jobs']} | {ms['allocator']:.1f} | {ms['store']:.1f} "
            f"| {ms['gcs']:.1f} | {total:.1f} | {ratio} | {each['per_s']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
