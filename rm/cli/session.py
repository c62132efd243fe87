"""What every command starts from: the client of the cluster that the command line names, and shared options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rm.client import Client

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="j17, or just 17.")]
JobIds = Annotated[list[str], typer.Argument(metavar="ID", help="j17, or just 17.")]


def connect(ctx: typer.Context, *, start: bool = False) -> Client:
    """Connect where `--address` says. Only commands that submit start an allocator where none runs."""
    from rm import client

    return client.connect(ctx.obj, start=start)
