"""What commands print: results on stdout, everything else on stderr, so that `--json` and pipes stay clean."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from rich.console import RenderableType

from rm.errors import ClusterError, RequestError, RmError
from rm.plain import plain
from rm.tables import console, write


def show(*what: RenderableType) -> None:
    """Print results on stdout."""
    screen = console()
    for each in what:
        write(screen, each)


def show_json(value: Any) -> None:
    """Print `value` as JSON and nothing else. ASCII only: what users wrote can't reach the terminal unescaped."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=True, allow_nan=False, default=str)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Something for the person, not for the pipe."""
    print(plain(text), file=sys.stderr, flush=True)


def say_error(error: RmError | str, label: str = "error") -> None:
    """One line, however many the message has."""
    # Not str(error): where it was raised in an actor, Ray makes that a traceback.
    text = " ".join((error.message if isinstance(error, RmError) else error).split())
    print(f"{label}: {plain(text)}", file=sys.stderr, flush=True)


def exit_code(error: RmError) -> int:
    """Whose move it is: 2 the caller's, 3 the world's, 1 ours."""
    if isinstance(error, RequestError):
        return 2
    return 3 if isinstance(error, ClusterError) else 1


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinities: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
