"""`rmctl`: the command line, thin over `rm.client.Client`.

Nothing heavy is imported before a command needs it: `rmctl --help` loads neither Ray nor pydantic.
Exit codes: 0 done, 1 failed (a job did, or we did), 2 the request can't be done as asked, 3 the cluster is not
as it must be. `rmctl run` passes on the job's own.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rm.cli.app import app
from rm.cli.screen import exit_code, say_error
from rm.errors import RmError


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """One command line; returns its exit code. Errors are one line on stderr; a traceback means a bug of ours."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that this locale can't write is no error
    try:
        return app(args=list(argv), prog_name="rmctl", standalone_mode=False) or 0
    except RmError as error:
        say_error(error)
        return exit_code(error)
    except Exception as error:
        # A usage error of Typer's, known by its shape: the classes moved between its versions.
        if not hasattr(error, "format_message"):
            raise
        say_error(error.format_message())
        context = getattr(error, "ctx", None)
        if context is not None:
            say_error(f"{context.command_path} --help shows what it takes", label="hint")
        return 2
