"""What policies make of two public traces: completion times, waits, fairness, and what preemption costs.

    python benchmarks/policies.py --traces DIR [--only helios_venus_2vc] [-p rm-default …] [--markdown]

DIR holds helios_venus_2vc.csv.gz (Hu et al., SC '21, CC-BY-4.0) and philly_oct14d.csv.gz (Jeon et al., USENIX ATC
'19, CC-BY-4.0). `fifo`, `fifo+skip`, `tiresias` and `srtf` follow the published simulators; `srtf` knows all durations
and is the bound. The others are our scheduler, which knows none: an eviction costs it 60 s of restart and the work
since the last checkpoint, one every 10 minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rm.errors import RmError
from rm.sim.cluster import parse_nodes
from rm.sim.fairness import equal_share_jct_s
from rm.sim.policies import policy_named
from rm.sim.report import Figures, figures_of
from rm.sim.trace import read_trace

CASES = (
    ("helios_venus_2vc", "vcvGl=20,vcvlY=2"),
    ("philly_oct14d", "64"),
    ("philly_oct14d", "80"),
)
POLICIES = ("fifo", "rm-fifo", "fifo+skip", "kueue", "slurm", "tiresias", "srtf", "rm-default", "rm-patient",
            "rm-shortest")  # fmt: skip
COLUMNS: tuple[tuple[str, str, Callable[[Figures], float]], ...] = (
    ("JCT MEAN s", "{:,.0f}", lambda each: each.mean_jct_s),
    ("P99", "{:,.0f}", lambda each: each.p99_jct_s),
    ("WAIT MEAN s", "{:,.0f}", lambda each: each.mean_queue_s),
    ("P99", "{:,.0f}", lambda each: each.p99_queue_s),
    ("LONGEST", "{:,.0f}", lambda each: each.max_queue_s),
    ("FTR MEAN", "{:.2f}", lambda each: each.mean_ftr),
    ("WORST", "{:,.0f}", lambda each: each.worst_ftr),
    ("JAIN", "{:.3f}", lambda each: each.jain),
    ("PREEMPTIONS", "{:,}", lambda each: each.preemptions),
    ("GPU-s LOST", "{:,.0f}", lambda each: each.gpu_seconds_lost),
)
"""Title, format and value. FTR: completion time over that under an equal share."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", metavar="TRACE")
    parser.add_argument("-p", "--policy", action="append", metavar="NAME")
    parser.add_argument("--markdown", action="store_true", help="tables as docs/simulator.md has them")
    options = parser.parse_args()
    titles = ["POLICY", *(title for title, _, _ in COLUMNS), "TOOK"]
    for trace, nodes in CASES:
        if options.only not in (None, trace):
            continue
        jobs, cluster = read_trace(options.traces / f"{trace}.csv.gz"), parse_nodes(nodes, 8)
        equal_share = equal_share_jct_s(jobs, cluster)
        rows: list[list[str]] = []
        for name in options.policy or POLICIES:
            began = time.perf_counter()
            replay = policy_named(name).replay(jobs, cluster)
            took_s = time.perf_counter() - began
            figures = figures_of(replay, equal_share)
            cells = [form.format(value(figures)) for _, form, value in COLUMNS]
            rows.append([name, *cells, f"{took_s:.1f} s"])
            print(f"{trace} {nodes} {' '.join(rows[-1])}", file=sys.stderr, flush=True)
        heading = f"{trace}, {len(jobs):,} jobs on {nodes} nodes of 8 GPUs"
        print(f"\n{heading}\n")
        if options.markdown:
            print("\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows]))
        else:
            show(titles, rows)
    return 0


def show(titles: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None, header_style="bold")
    for title in titles:
        table.add_column(title, justify="left" if title == "POLICY" else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
