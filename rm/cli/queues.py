"""Queues: what they own and use, and the file that says so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rm import tables
from rm.cli.screen import note, show, show_json
from rm.cli.session import AsJson, connect
from rm.errors import InvalidSpec
from rm.plain import plain


def list_queues(ctx: typer.Context, as_json: AsJson = False) -> int:
    """The tree of queues: what each owns, uses, borrows and lends.

    Amounts are GPUs. A queue with others below it counts these in. SHARE is what it borrows, as thousandths of all
    that can be lent, by its weight: the lowest comes first.
    """
    views = connect(ctx).queues()
    if as_json:
        show_json([view.to_dict() for view in views])
    else:
        show(tables.queues_table(views))
    return 0


def apply(
    ctx: typer.Context,
    file: Annotated[str, typer.Option("--file", "-f", metavar="FILE", help="An rm.yaml; - reads stdin.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would do to the jobs that live.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also where its admins leave you out: you can't take it back.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Put an rm.yaml in force: queues, quotas and rules.

    It replaces all that was in force before. Running jobs go on. What the change does to live jobs is listed; with
    --dry-run that is all. Only admins of the rules in force may do it, if these name any.
    """
    text = _text(file)
    answer = connect(ctx).apply(text, dry_run=dry_run, force=force)
    if as_json:
        show_json(answer)
        return 0
    for warning in answer["warnings"]:
        note(f"warning: {warning}")
    for consequence in answer["consequences"]:
        show(plain(consequence))
    if not answer["consequences"]:
        note("no live job is affected" if dry_run else "no live job was affected")
    note("not applied: this was a dry run" if not answer["applied"] else "applied")
    return 0


def _text(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise InvalidSpec(f"file: {file}: {error.strerror or error}", field="file") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidSpec(f"file: {file}: line {line} is not UTF-8", field="file") from None
