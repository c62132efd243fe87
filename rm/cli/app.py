"""The application: its help, the options before the command, and the commands in the order of the help."""

from __future__ import annotations

from typing import Annotated

import typer

from rm.cli import cluster, cluster_files, ledger, looking, nodes, queues, simulate, submitting

HELP = """Share a Ray cluster's GPUs: request, queue, run, release.

[bold]Start:[/bold]
  [cyan]rmctl start --local[/cyan]                   a Ray cluster on this machine
  [cyan]rmctl run -g 1 -- python train.py[/cyan]     on 1 GPU, with its output here

[bold]Then:[/bold]
  [cyan]rmctl submit -g 4 -- python train.py[/cyan]  hand in, go home; prints its id
  [cyan]rmctl ls[/cyan]                              what runs, what waits, and why
  [cyan]rmctl logs -f j17[/cyan]                     follow a job's output
  [cyan]rmctl nodes[/cyan]                           which GPUs are free

[cyan]rmctl demo[/cyan] shows all of it. [cyan]rmctl COMMAND --help[/cyan] explains a command.
"""

PASS_ON = {"allow_interspersed_args": False}
"""The first word that is no option begins the command: its own options stay its own, with or without `--`."""

app = typer.Typer(
    help=HELP,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
    invoke_without_command=True,
)


@app.callback()
def before(
    ctx: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="The Ray cluster; else RAY_ADDRESS, else the one on this machine.",
        ),
    ] = None,
) -> None:
    ctx.obj = address
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


app.command("run", rich_help_panel="Jobs", context_settings=PASS_ON)(submitting.run)
app.command("submit", rich_help_panel="Jobs", context_settings=PASS_ON)(submitting.submit)
app.command("ls", rich_help_panel="Jobs")(looking.list_jobs)
app.command("show", rich_help_panel="Jobs")(looking.show_job)
app.command("logs", rich_help_panel="Jobs")(looking.logs)
app.command("why", rich_help_panel="Jobs")(looking.why)
app.command("wait", rich_help_panel="Jobs")(looking.wait_for)
app.command("hold", rich_help_panel="Jobs")(looking.hold)
app.command("release", rich_help_panel="Jobs")(looking.release)
app.command("cancel", rich_help_panel="Jobs")(looking.cancel)
app.command("nodes", rich_help_panel="Cluster")(cluster.nodes)
app.command("scale", rich_help_panel="Cluster")(cluster.scale)
app.command("cordon", rich_help_panel="Cluster")(nodes.cordon)
app.command("drain", rich_help_panel="Cluster")(nodes.drain)
app.command("uncordon", rich_help_panel="Cluster")(nodes.uncordon)
app.command("queues", rich_help_panel="Cluster")(queues.list_queues)
app.command("apply", rich_help_panel="Cluster")(queues.apply)
app.command("events", rich_help_panel="Cluster")(looking.events)
app.command("audit", rich_help_panel="Cluster")(cluster.audit)
app.command("start", rich_help_panel="Cluster")(cluster.start)
app.command("stop", rich_help_panel="Cluster")(cluster.stop)
app.add_typer(ledger.ledger, name="ledger", rich_help_panel="Cluster")
app.add_typer(cluster_files.files, name="cluster", rich_help_panel="Cluster")
app.command("demo", rich_help_panel="Cluster")(cluster.demo)
app.command("simulate", cls=simulate.NamesPolicies, rich_help_panel="Planning")(simulate.simulate)
app.add_typer(simulate.traces, name="trace", rich_help_panel="Planning")
app.command("version", rich_help_panel="Cluster")(cluster.version)
