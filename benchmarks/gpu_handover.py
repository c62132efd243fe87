"""How long a real GPU computes nothing between two jobs, and whether its memory is free when the next one starts.

    python benchmarks/gpu_handover.py [--jobs 20] [--json]

A Ray of its own that finds the machine's GPUs by itself. Each job is a function that makes a CUDA context, fills nine
tenths of the first GPU's memory and ends; all are submitted before the first has run. Between the last line of one and
the next one's first result from the GPU lie the end of a process and of its context, the ledger's commits, the look at
the driver, the start of a process, and a new context. Bare Ray does the same with a placement group, a task in it, and
the group's removal. Needs a GPU, CUDA's PyTorch and nvidia-ml-py; touches no other Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

BARE = 10
"""So many times bare Ray does it: it takes seconds each."""

Times = tuple[float, float, float, float]
"""When the function began, when the GPU had given a result, when it ended; and what part of the memory was free."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rm-bench-") as home:
        rows = measure(Path(home), options.jobs)
    print(json.dumps(rows, indent=2) if options.json else table(rows))


def measure(home: Path, count: int) -> list[dict[str, Any]]:
    os.environ |= {"RAY_TMPDIR": str(home), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray

    import rm
    from rm.spec import Config

    context = ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        bare = bare_ray()
        config = Config(home=home / "rm", checkpoint_root=str(home / "checkpoints"))
        client = rm.connect(context.address_info["gcs_address"], config=config)
        gpus = int(ray.cluster_resources()["GPU"])
        # The first ones tell what to preload.
        for _ in range(2):
            client.submit(fill, num_gpus=gpus, nproc_per_node=1).result(300)
        jobs = client.submit_many([fill] * count, num_gpus=gpus, nproc_per_node=1)
        ours = [job.result(300) for job in jobs]
        return [row("ray-rm", ours), row("bare Ray", bare)]
    finally:
        ray.shutdown()


def fill() -> Times:
    began = time.time()
    import torch

    free, total = torch.cuda.mem_get_info()
    torch.ones(1, device="cuda").item()
    ready = time.time()
    torch.empty(int(total * 0.9), dtype=torch.uint8, device="cuda").fill_(1)
    torch.cuda.synchronize()
    return began, ready, time.time(), free / total


def bare_ray() -> list[Times]:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    gpus = int(ray.cluster_resources()["GPU"])
    task = ray.remote(num_cpus=0, num_gpus=gpus)(fill)
    times = []
    for _ in range(BARE):
        group = placement_group([{"GPU": gpus}])
        strategy = PlacementGroupSchedulingStrategy(group)
        times.append(ray.get(task.options(scheduling_strategy=strategy).remote()))
        remove_placement_group(group)
    return times


def row(who: str, times: list[Times]) -> dict[str, Any]:
    lines = [after[0] - before[2] for before, after in pairwise(times)]
    results = [after[1] - before[2] for before, after in pairwise(times)]
    return {
        "who": who,
        "first_line_ms": 1000 * statistics.median(lines),
        "first_result_ms": 1000 * statistics.median(results),
        "longest_ms": 1000 * max(results),
        "least_free": min(each[3] for each in times),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "first line, ms",
        "first result from the GPU, ms",
        "longest, ms",
        "least memory free at its start",
    ]
    lines = [
        f"| from the end of one job to the next one's | {' | '.join(head)} |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each['who']} | {each['first_line_ms']:.0f} | {each['first_result_ms']:.0f} | {each['longest_ms']:.0f} "
        f"| {each['least_free']:.1%} |"
        for each in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
