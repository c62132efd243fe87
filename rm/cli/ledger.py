"""The ledger's file: a copy of it, a copy put back, and whether what it holds can be right. Needs no Ray."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rm import tables
from rm.cli.screen import note, show, show_json
from rm.cli.session import AsJson, settings
from rm.plain import plain

if TYPE_CHECKING:
    from rm.ledger import Summary

ledger = typer.Typer(help="Back up, restore and check the ledger.", no_args_is_help=True)


@ledger.callback()
def before_ledger() -> None:
    """Back up, restore and check the ledger.

    On the head, with the RM_HOME and RM_LEDGER_URL of the allocator. No Ray is needed.
    """


@ledger.command("backup")
def back_up(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The copy to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
    as_json: AsJson = False,
) -> int:
    """Copy the ledger to FILE, also while the allocator runs.

    The copy is looked through before it gets its name, and readable by you alone. For a ledger in PostgreSQL the
    command to use is printed.
    """
    from rm.ledger import back_up

    made = back_up(settings().ledger_url, file, force=force)
    if as_json:
        show_json({"file": str(file.absolute()), "bytes": file.stat().st_size, **asdict(made)})
    else:
        show(tables.facts_table([("backup", file), ("bytes", file.stat().st_size), *_facts(made)]))
    return 0


@ledger.command("restore")
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also a backup with findings, or of another ledger.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Put a backup in the ledger's place. The allocator must be stopped.

    What was there is kept under a name with the time.
    """
    from rm.ledger import restore

    done = restore(settings().ledger_url, file, force=force)
    if as_json:
        show_json(done.to_dict())
    else:
        facts = [("ledger", done.path), *(("kept", each) for each in done.kept)]
        show(tables.facts_table([*facts, *_facts(replace(done.backup, next_job=done.next_job))]))
    for line in (
        f"Start it with `rmctl start`. It knows what was known at {_time(done.backup.last_at)}:",
        "- jobs accepted since then are unknown; those that still run are ended at the start",
        "- jobs that ran then are taken over if the same attempt still runs; else they run again, also those",
        "  that have ended since, from their last checkpoint",
        f"- new jobs are numbered from j{done.next_job}, so that none meets the files of a forgotten one",
    ):
        note(line)
    return 0


@ledger.command("check")
def check(
    where: Annotated[
        str | None,
        typer.Argument(metavar="[URL or FILE]", help="Else the ledger of RM_HOME and RM_LEDGER_URL."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Whether a ledger or a backup is whole, and what it says can have happened. Reads only.

    Exit code 0: nothing found. 1: something is listed. 3: it can't be read at all.
    """
    from rm.ledger import check

    report = check(where or settings().ledger_url)
    if as_json:
        show_json(report.to_dict())
        return int(bool(report.findings))
    show(tables.facts_table([("ledger", report.name), *_facts(report.summary)]))
    if report.summary.schema != report.newest:
        note(f"its schema {report.summary.schema} is older than {report.newest}: the next start upgrades it")
    for finding in report.findings:
        show(plain(str(finding)))
    count = len(report.findings)
    note(f"{count} finding{'s' if count > 1 else ''}" if count else "nothing wrong was found")
    return int(bool(report.findings))


def _facts(summary: Summary) -> list[tuple[str, object]]:
    if not summary.key:
        return [("schema", summary.schema)]
    return [
        ("key", summary.key),
        ("schema", summary.schema),
        ("jobs", f"{summary.jobs}, {summary.live} live; the next is j{summary.next_job}"),
        ("events", f"{summary.events}, the last of {_time(summary.last_at)}"),
    ]


def _time(at: float | None) -> str:
    return "no event yet" if at is None else datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")
