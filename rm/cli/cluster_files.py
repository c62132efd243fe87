"""Cluster files of `ray up`: what is wrong with one, before it costs anything. Needs no cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rm.cli.screen import note, show, show_json
from rm.cli.session import AsJson
from rm.errors import InvalidSpec
from rm.plain import plain

files = typer.Typer(help="Check the files of `ray up`.", no_args_is_help=True)


@files.callback()
def before_cluster() -> None:
    """Check the files of `ray up`. Needs no cluster, starts nothing, and asks no cloud."""


@files.command("check")
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A cluster.yaml; - reads stdin.")],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", metavar="RM_YAML", help="Compare with the quotas of this rm.yaml too."
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Look through a cluster file: Ray's own demands, GPU types, sizes, token, open ports.

    Exit code 1 where there are errors. Warnings alone give 0: such a file works, and is probably not what you mean.
    """
    from rm import cluster_files
    from rm.settings import Settings

    policy = Settings.parse(_text(str(config))).policy() if config is not None else None
    report = cluster_files.check(_text(file), policy)
    if as_json:
        show_json(
            {
                "file": file,
                "ok": not report.has_errors,
                "findings": [each.to_dict() for each in report.findings],
                "not_checked": list(report.not_checked),
            }
        )
        return 1 if report.has_errors else 0
    for each in report.findings:
        where = f"{file}:{each.line}" if each.line else file
        field = f"{each.field}: " if each.field else ""
        show(plain(f"{where}: {each.severity}: {field}{each.message}"), plain(f"    {each.advice}"))
    for words in report.not_checked:
        note(words)
    errors = sum(each.severity == "error" for each in report.findings)
    note(f"{errors} errors, {len(report.findings) - errors} warnings")
    return 1 if report.has_errors else 0


def _text(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise InvalidSpec(f"file: {file}: {error.strerror or error}", field="file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InvalidSpec(f"file: {file}: line {line} is not UTF-8", field="file") from None
