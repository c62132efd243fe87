"""`rmctl simulate` and `rmctl trace`: policies on recorded workloads. Neither needs a cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table
from typer.core import TyperCommand, TyperOption

from rm import tables
from rm.cli.screen import note, show, show_json
from rm.cli.session import AsJson
from rm.cli.session import settings as own_settings
from rm.errors import InvalidSpec

if TYPE_CHECKING:
    from rm.core.policy import Policy as Rules
    from rm.sim.cluster import SimCluster
    from rm.sim.live import World
    from rm.sim.policy import Policy, Progress
    from rm.sim.trace import TraceJob

OURS = "rm-default"
DEFAULT_POLICIES = (OURS,)
MOST_JOBS = 1_000_000
"""Of a ledger, the oldest."""
PROGRESS_EVERY = 64
"""Ended jobs between two looks at the clock; a terminal needs no more."""


class NamesPolicies(TyperCommand):
    """Its help names the policies that there are; only who asks for it waits for their import."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rm.sim.policies import POLICIES

        for each in self.params:
            if each.name == "policy" and isinstance(each, TyperOption):
                each.help = f"{', '.join(POLICIES)}. Repeatable; --policies explains them."
        super().format_help(ctx, formatter)


def simulate(
    trace: Annotated[
        Path | None,
        typer.Argument(metavar="[TRACE]", help="A CSV of jobs, also .gz; see rmctl trace convert."),
    ] = None,
    nodes: Annotated[
        str | None,
        typer.Option(
            "--nodes",
            metavar="N",
            help="47, or a=20,b=2 for queues with nodes of their own, or 40:A100,7:V100 for GPU types.",
        ),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, metavar="N", help="On each node.")] = 8,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", metavar="NAME", help="Repeatable; --policies lists them."),
    ] = None,
    policies: Annotated[
        bool, typer.Option("--policies", help="List the policies, and do nothing else.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="RM.YAML", help="Replay our scheduler under these rules too, as policy `config`."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Change a rule of our scheduler: queues.research.nominal=16, backfill=skip. Repeatable.",
        ),
    ] = None,
    from_ledger: Annotated[
        bool, typer.Option("--from-ledger", help="Replay the jobs of this installation's own ledger.")
    ] = False,
    autoscale: Annotated[
        str | None,
        typer.Option(metavar="MIN:MAX", help="Instead of --nodes: nodes that come and go with the demand."),
    ] = None,
    boot: Annotated[str, typer.Option(metavar="TIME", help="From a node's launch until it is up.")] = "180",
    idle: Annotated[
        str, typer.Option(metavar="TIME", help="How long a node is idle before it leaves.")
    ] = "300",
    checkpoint: Annotated[
        str, typer.Option(metavar="TIME", help="Run time between two checkpoints; evictions lose the rest.")
    ] = "600",
    restart: Annotated[
        str, typer.Option(metavar="TIME", help="What a start after an eviction costs.")
    ] = "60",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture of use and queues over time.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Replay a trace under one or more policies and compare what they make of it.

    Queueing delay is the time that a job is there without GPUs. The finish-time ratio is its completion time
    over the one that an equal share of the GPUs would have given it: above 1 it came off worse.
    """
    from rm.sim.fairness import equal_share_jct_s
    from rm.sim.live import World
    from rm.sim.plot import check_plot, plot_replays
    from rm.sim.policies import POLICIES
    from rm.sim.report import figures_of, figures_table

    if policies:
        if as_json:
            show_json([{"name": each.name, "summary": each.summary} for each in POLICIES.values()])
        else:
            show(_policies_table())
        return 0
    world = World(
        checkpoint_s=_seconds("checkpoint", checkpoint, least=1),
        restart_s=_seconds("restart", restart),
        boot_s=_seconds("boot", boot),
        idle_s=_seconds("idle", idle),
    )
    chosen = _chosen(policy, config, settings or [], world)
    cluster = _cluster(nodes, autoscale, gpus_per_node)
    if cluster.grows:
        _must_grow(chosen)
    if plot is not None:
        check_plot(plot)
    jobs = _jobs(trace, from_ledger=from_ledger)
    equal_share = equal_share_jct_s(jobs, cluster)
    figures, replays = [], []
    for each in chosen:
        with progress_bar(each.name, len(jobs)) as progress:
            replay = each.replay(jobs, cluster, progress)
        figures.append(figures_of(replay, equal_share))
        if plot is not None:
            replays.append(replay)
    if as_json:
        show_json([row.to_dict() for row in figures])
    else:
        show(figures_table(figures))
        up_to = "up to " if cluster.grows else ""
        note(f"{len(jobs)} jobs on {up_to}{cluster.gpus} GPUs")
    if plot is not None:
        plot_replays(plot, replays)
    return 0


def _policies_table() -> Table:
    from rm.sim.policies import POLICIES

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("POLICY", no_wrap=True)
    table.add_column("RULE")
    for each in POLICIES.values():
        table.add_row(each.name, each.summary)
    return table


def _chosen(names: list[str] | None, config: Path | None, settings: list[str], world: World) -> list[Policy]:
    """The policies named, ours with this world and these changes; with a file of rules also those."""
    from rm.sim.live import LivePolicy
    from rm.sim.policies import policy_named
    from rm.sim.rules import override

    chosen = [policy_named(name) for name in dict.fromkeys(names or ())]
    if config is not None:
        chosen.append(LivePolicy("config", f"our scheduler under {config}", _rules_of(config)))
    if not chosen:
        chosen = [policy_named(each) for each in DEFAULT_POLICIES]
    ours = [each for each in chosen if isinstance(each, LivePolicy)]
    if settings and not ours:
        raise InvalidSpec(
            f"set: it changes rules of our scheduler, and no policy here is it; add --policy {OURS}",
            field="set",
        )
    adjust = partial(override, settings=settings)
    return [
        replace(each, world=world, adjust=adjust) if isinstance(each, LivePolicy) else each for each in chosen
    ]


def _rules_of(config: Path) -> Rules:
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec(f"config: {config}: {error}", field="config") from error
    try:
        settings = import_module("rm.settings")
    except ModuleNotFoundError as error:
        raise InvalidSpec(
            f"config: this installation can't read rules from a file yet ({error}); --set changes single rules",
            field="config",
        ) from error
    return cast("Rules", settings.Settings.parse(text).policy())


def _cluster(nodes: str | None, autoscale: str | None, gpus_per_node: int) -> SimCluster:
    from rm.sim.cluster import parse_nodes

    if autoscale is not None and nodes is None:
        return parse_nodes(autoscale, gpus_per_node, grows=True)
    if nodes is not None and autoscale is None:
        return parse_nodes(nodes, gpus_per_node)
    raise InvalidSpec("nodes: say either --nodes N or --autoscale MIN:MAX", field="nodes")


def _must_grow(policies: list[Policy]) -> None:
    from rm.sim.live import LivePolicy

    fixed = [each.name for each in policies if not isinstance(each, LivePolicy)]
    if fixed:
        raise InvalidSpec(
            f"autoscale: {', '.join(fixed)} has rules for a fixed cluster alone; use --nodes, or --policy {OURS}",
            field="autoscale",
        )


def _jobs(trace: Path | None, *, from_ledger: bool) -> list[TraceJob]:
    from rm.sim.trace import read_trace

    if from_ledger == (trace is not None):
        raise InvalidSpec("trace: name a trace, or say --from-ledger", field="trace")
    return read_trace(trace) if trace is not None else _ledger_jobs()


def _ledger_jobs() -> list[TraceJob]:
    """What has run and ended by the ledger that `RM_LEDGER_URL` or `RM_HOME` names."""
    from sqlalchemy import make_url

    from rm.ledger import Ledger
    from rm.sim.history import trace_of

    url = own_settings().ledger_url
    if url.startswith("sqlite") and not Path(make_url(url).database or "").is_file():
        raise InvalidSpec(
            f"from_ledger: there is no ledger at {url} (RM_LEDGER_URL, RM_HOME)", field="from_ledger"
        )
    ledger = Ledger.open(url)
    try:
        records = [row.job for row in ledger.jobs(limit=MOST_JOBS, newest_first=False)]
        starts = {
            job.id: event.at
            for job in records
            if job.attempts > 1
            for event in ledger.events(job.id)
            if event.kind == "RunStarted"
        }
    finally:
        ledger.close()
    jobs, dropped = trace_of(records, starts)
    for reason, count in dropped.most_common():
        note(f"left out: {count} {reason}")
    return jobs


def _seconds(name: str, text: str, least: float = 0) -> float:
    from rm.spec import parse_duration

    try:
        value = parse_duration(text)
    except ValueError as error:
        raise InvalidSpec(f"{name}: {error}", field=name) from error
    if value is None or value < least:
        raise InvalidSpec(f"{name}: {text!r} is less than {least:g} s", field=name)
    return value


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
