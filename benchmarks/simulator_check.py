"""Check the simulator: our published policies against what the published simulators gave on the same traces.

    python benchmarks/simulator_check.py --traces DIR

DIR holds helios_venus_2vc.csv.gz (Hu et al., SC '21, CC-BY-4.0) and philly_oct14d.csv.gz (Jeon et al., USENIX
ATC '19, CC-BY-4.0), in the columns of `rm.sim.trace`. The references are mean completion time and mean queueing
delay in seconds from the simulators of Helios (SC '21) and Lucid (ASPLOS '23). Exit code 1 if one deviates by
more than --limit percent, or by more than a second where that is more; 2 if a trace can't be read.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rm.errors import RmError
from rm.sim.cluster import parse_nodes
from rm.sim.policies import policy_named
from rm.sim.trace import read_trace

REFERENCES: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("helios_venus_2vc", "vcvGl=20,vcvlY=2"): {
        "fifo": (16_534, 10_884),
        "sjf": (6_273, 622),
        "srtf": (6_082, 416),
        "tiresias": (10_951, 5_279),
        "fifo+skip": (5_902, 252),
        "sjf+skip": (5_892, 241),
    },
    ("philly_oct14d", "64"): {
        "fifo": (98_175, 89_272),
        "sjf": (14_334, 5_430),
        "srtf": (10_192, 1_243),
        "tiresias": (13_987, 5_067),
        "fifo+skip": (23_879, 14_976),
        "sjf+skip": (13_163, 4_260),
    },
    ("philly_oct14d", "72"): {
        "fifo": (33_390, 24_487),
        "sjf": (12_073, 3_169),
        "srtf": (9_612, 677),
        "tiresias": (10_576, 1_661),
    },
    ("philly_oct14d", "80"): {
        "fifo": (14_367, 5_464),
        "sjf": (10_922, 2_019),
        "srtf": (9_309, 386),
        "tiresias": (9_577, 667),
        "fifo+skip": (12_309, 3_406),
        "sjf+skip": (10_580, 1_677),
    },
}
"""(trace, nodes of 8 GPUs) → policy → mean completion time, mean queueing delay; seconds."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR")
    parser.add_argument("--limit", type=float, default=1.0, metavar="PERCENT")
    options = parser.parse_args()
    table = Table(box=None, header_style="bold")
    for title in ("TRACE", "NODES", "POLICY"):
        table.add_column(title)
    for title in ("JCT", "REFERENCE", "%", "QUEUE", "REFERENCE", "%", "TOOK"):
        table.add_column(title, justify="right")
    off = 0
    for (trace, nodes), references in REFERENCES.items():
        jobs = read_trace(options.traces / f"{trace}.csv.gz")
        for name, reference in references.items():
            began = time.perf_counter()
            outcomes = policy_named(name).replay(jobs, parse_nodes(nodes, 8)).outcomes
            took_s = time.perf_counter() - began
            ours = (
                sum(each.jct_s for each in outcomes) / len(jobs),
                sum(each.queue_s for each in outcomes) / len(jobs),
            )
            cells: list[str] = []
            for got, wanted in zip(ours, reference, strict=True):
                # The references are whole seconds: half of one is no deviation.
                off += abs(got - wanted) > max(1.0, wanted * options.limit / 100)
                cells += (f"{got:,.1f}", f"{wanted:,.0f}", f"{(got / wanted - 1) * 100:+.3f}")
            table.add_row(trace, nodes, name, *cells, f"{took_s:.1f} s")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(f"{off} figures are off by more than {options.limit:g} %" if off else "all within the limit")
    return 1 if off else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
