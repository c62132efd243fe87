"""`rmctl simulate` and `rmctl trace`: policies on recorded workloads. Neither needs a cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rm import tables
from rm.cli.screen import note, show, show_json
from rm.cli.session import AsJson
from rm.errors import InvalidSpec

if TYPE_CHECKING:
    from rm.sim.policy import Progress

DEFAULT_POLICIES = ("fifo",)
PROGRESS_EVERY = 64
"""Ended jobs between two looks at the clock; a terminal needs no more."""


def simulate(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A CSV of jobs, also .gz; see rmctl trace convert.")
    ],
    nodes: Annotated[
        str,
        typer.Option(
            "--nodes", metavar="N", help="47, or vcvGl=20,vcvlY=2 for queues with nodes of their own."
        ),
    ],
    gpus_per_node: Annotated[int, typer.Option(min=1, metavar="N", help="On each node.")] = 8,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            metavar="NAME",
            help="fifo, sjf, srtf, tiresias, fifo+skip, sjf+skip. Repeatable.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture of use and queues over time.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Replay a trace under one or more policies and compare what they make of it.

    Queueing delay is the time that a job is there without GPUs. The finish-time ratio is its completion time
    over the one that an equal share of the GPUs would have given it: above 1 it came off worse.
    """
    from rm.sim.cluster import parse_nodes
    from rm.sim.fairness import equal_share_jct_s
    from rm.sim.plot import check_plot, plot_replays
    from rm.sim.policies import policy_named
    from rm.sim.report import figures_of, figures_table
    from rm.sim.trace import read_trace

    policies = [policy_named(name) for name in dict.fromkeys(policy or DEFAULT_POLICIES)]
    cluster = parse_nodes(nodes, gpus_per_node)
    if plot is not None:
        check_plot(plot)
    jobs = read_trace(trace)
    equal_share = equal_share_jct_s(jobs, cluster)
    figures, replays = [], []
    for each in policies:
        with progress_bar(each.name, len(jobs)) as progress:
            replay = each.replay(jobs, cluster, progress)
        figures.append(figures_of(replay, equal_share))
        if plot is not None:
            replays.append(replay)
    if as_json:
        show_json([row.to_dict() for row in figures])
    else:
        show(figures_table(figures))
        note(f"{len(jobs)} jobs on {cluster.gpus} GPUs")
    if plot is not None:
        plot_replays(plot, replays)
    return 0


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Progress]:
    """A bar on stderr where that is a terminal, nothing elsewhere. It is gone when the run has ended."""
    from rm.sim.policy import silent

    if not sys.stderr.isatty():
        yield silent
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=tables.console(sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=total)

        def progress(ended: int) -> None:
            if ended % PROGRESS_EVERY == 0:
                bar.update(task, completed=ended)

        yield progress


traces = typer.Typer(help="Traces for `rmctl simulate`.", no_args_is_help=True)


@traces.callback()
def before_traces() -> None:
    """Traces for `rmctl simulate`."""


@traces.command("convert")
def convert_trace(
    source: Annotated[str, typer.Option("--from", metavar="FORMAT", help="philly, helios, openb or swf.")],
    given: Annotated[Path, typer.Argument(metavar="IN", help="The published file, also .gz.")],
    made: Annotated[Path, typer.Argument(metavar="OUT", help="The trace to write; .gz compresses it.")],
    as_json: AsJson = False,
) -> int:
    """Turn a published trace into the CSV that `rmctl simulate` reads.

    philly: cluster_job_log, JSON. helios: cluster_log.csv. openb: openb_pod_list_*.csv of Alibaba. swf: the
    Standard Workload Format, processors as GPUs. What can't be replayed is left out and counted.
    """
    from rm.sim.converters import convert
    from rm.sim.trace import write_trace

    if made.exists() and given.exists() and made.samefile(given):
        raise InvalidSpec("out: it is the file that is read", field="out")
    converted = convert(source, given)
    count = write_trace(made, converted.jobs)
    if as_json:
        show_json({"jobs": count, "dropped": dict(converted.dropped), "path": str(made)})
        return 0
    note(f"{count} job{'s' * (count != 1)} in {made}")
    for reason, dropped in converted.dropped.most_common():
        note(f"left out: {dropped} {reason}")
    return 0
