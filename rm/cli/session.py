"""What every command starts from: the client of the cluster that the command line names, and shared options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rm.errors import InvalidSpec

if TYPE_CHECKING:
    from rm.client import Client
    from rm.spec import Config

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="j17, or just 17.")]
JobIds = Annotated[list[str], typer.Argument(metavar="ID", help="j17, or just 17.")]


def connect(
    ctx: typer.Context, *, start: bool = False, address: str | None = None, any_version: bool = False
) -> Client:
    """Connect to `address`, else where `--address` says. Only commands that submit start an allocator."""
    from rm import client

    return client.connect(address or ctx.obj, config=settings(), start=start, any_version=any_version)


def settings() -> Config:
    """The allocator's settings out of RM_* variables. Raises InvalidSpec naming the variable."""
    from pydantic import ValidationError

    from rm.spec import Config

    try:
        return Config().resolved()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"RM_{'_'.join(str(part) for part in first['loc'])}".upper()
        raise InvalidSpec(f"{name}: {first['msg']}, not {first['input']!r}", field=name) from None
