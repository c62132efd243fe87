"""Nodes that get nothing new: cordon, drain, uncordon."""

from __future__ import annotations

from typing import Annotated

import typer

from rm import tables
from rm.cli.screen import show, show_json
from rm.cli.session import AsJson, connect
from rm.plain import plain
from rm.views import NodeView

Nodes = Annotated[list[str], typer.Argument(metavar="NODE", help="Its name, its id, or how its id begins.")]
Why = Annotated[str, typer.Option("--reason", metavar="TEXT", help="For those who wonder.")]


def cordon(ctx: typer.Context, nodes: Nodes, reason: Why = "", as_json: AsJson = False) -> int:
    """Place nothing new on nodes; what runs there goes on."""
    _report(connect(ctx).cordon(*nodes, reason=reason), as_json)
    return 0


def drain(
    ctx: typer.Context,
    nodes: Nodes,
    deadline: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop what still runs there after 90, 15m, 2h; 0: now."),
    ] = None,
    reason: Why = "",
    as_json: AsJson = False,
) -> int:
    """Empty nodes: cordon them, and wait until nothing of ours is left there.

    With a deadline, what still runs then is stopped with its grace and queued again with its age and its
    checkpoint; that uses no retry. Without one, its end is waited for. `rmctl nodes` says when a node is drained.
    """
    _report(connect(ctx).drain(*nodes, deadline=deadline, reason=reason), as_json)
    return 0


def uncordon(ctx: typer.Context, nodes: Nodes, as_json: AsJson = False) -> int:
    """Place jobs on nodes again; what was counted against them is forgotten."""
    _report(connect(ctx).uncordon(*nodes), as_json)
    return 0


def _report(views: list[NodeView], as_json: bool) -> None:
    if as_json:
        show_json([view.to_dict() for view in views])
        return
    for view in views:
        holds = f"; {', '.join(view.jobs)} there" if view.jobs else "; nothing of ours runs there"
        show(plain(f"{view.name} ({view.id[:8]}) {tables.node_status(view)}{holds}"))
