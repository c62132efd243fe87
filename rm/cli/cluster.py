"""The cluster and the resource manager itself: nodes, start, stop, demo, version."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rm import tables
from rm.cli.screen import note, show, show_json
from rm.cli.session import AsJson, connect
from rm.errors import AllocatorUnavailable, InvalidSpec, NoCluster

if TYPE_CHECKING:
    from rm.client import Client


def nodes(ctx: typer.Context, as_json: AsJson = False) -> int:
    """Each node's GPUs: in all, held by jobs of rm, held by other work, free."""
    views = connect(ctx).nodes()
    if as_json:
        show_json([view.to_dict() for view in views])
        return 0
    if not views:
        note("the cluster has no nodes")
        return 0
    screen = tables.console()
    show(tables.nodes_table(views, ascii_only=not screen.encoding.startswith("utf")))
    return 0


def demo(
    num_gpus: Annotated[
        int | None,
        typer.Option("--num-gpus", "-g", min=1, help="Instead of the machine's own: so many logical ones."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The steps as JSON on stdout; what happens on stderr.")
    ] = False,
) -> int:
    """Watch the whole of it in half a minute: two trainings that need the same GPUs, on a Ray of their own."""
    from rm.demo import demo

    story = demo(num_gpus, sys.stderr if as_json else sys.stdout)
    if as_json:
        show_json(story.to_dict())
    return 0 if story.succeeded else 1


def version(as_json: AsJson = False) -> int:
    """Versions of rm, Ray and Python here."""
    from importlib.metadata import PackageNotFoundError, version

    import rm

    try:
        ray = version("ray")
    except PackageNotFoundError:
        ray = "not installed"
    versions = {"ray-rm": rm.__version__, "ray": ray, "python": ".".join(map(str, sys.version_info[:3]))}
    if as_json:
        show_json(versions)
    else:
        print(", ".join(f"{name} {number}" for name, number in versions.items()))
    return 0


def start():
    return 0


def stop():
    return 0
