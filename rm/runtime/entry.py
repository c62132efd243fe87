"""Runs a pickled Python function as one rank: `python -m rm.runtime.entry PAYLOAD RESULT`.

PAYLOAD is a file with cloudpickle of (function, args, kwargs). Rank 0 (RANK, as torchrun sets it; 0 without)
leaves cloudpickle of {"ok": value} or {"error": {"type", "message", "traceback", "exception"}} at RESULT. The
other ranks leave only errors, each beside it (`result_path`), so that the exception of whichever rank failed
first can be raised where the job was submitted. RESULT appears whole or not at all. The exit code is the
function's verdict: 0, 1 for an exception, n for SystemExit(n).

Standard library, cloudpickle and our errors only: this import is part of every job's start-up, and user code
must find the interpreter as clean as `python script.py` would have it.
"""

from __future__ import annotations

import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import cloudpickle

from rm.errors import NotPicklable, PayloadTooLarge, RequestError

LARGE = ("numpy", "pandas", "scipy", "sklearn", "torch", "torchvision", "transformers")
"""Modules that take long to import, and that a fork of the importing process may go on with."""
RESULT_LIMIT_BYTES = 16 * 1024 * 1024
EXCEPTION_LIMIT_BYTES = 1024 * 1024


def result_path(result: Path, rank: int) -> Path:
    """Where the rank of this global number leaves its result or its error; the runner reads it there."""
    return result if rank == 0 else result.with_name(f"{result.name}.rank{rank}")


def modules_path(result: Path) -> Path:
    """Where rank 0 leaves which of the `LARGE` modules it has imported, as words."""
    return result.with_name(f"{result.name}.modules")


def load_error(error: dict[str, Any]) -> BaseException | None:
    """The exception in an `error` of a result file, or None if it cannot be rebuilt here. For the client."""
    try:
        exception = cloudpickle.loads(error["exception"])
    except Exception:  # whatever the user's classes raise, or there is none
        return None
    return exception if isinstance(exception, BaseException) else None


def main(payload: str, result: str) -> int:
    """Load, call, leave the result; return the exit code."""
    rank = int(os.environ.get("RANK") or 0)
    path = result_path(Path(result), rank)
    try:
        return _main(payload, path, rank)
    finally:
        if rank == 0 and (large := [name for name in LARGE if name in sys.modules]):
            _write(modules_path(path), " ".join(large).encode())


def _main(payload: str, path: Path, rank: int) -> int:
    try:
        function, args, kwargs = _load(Path(payload))
        value = _call(function, args, kwargs)
        if rank == 0:
            _write(path, _pickle_result(value))
        return 0
    except SystemExit as asked:
        code = _exit_code(asked)
        if code != 0:
            _write(path, cloudpickle.dumps({"error": _describe(asked)}))
        elif rank == 0:
            _write(path, cloudpickle.dumps({"ok": None}))
        return code
    except BaseException as error:
        described = _describe(error)
        _say(described["traceback"])
        _write(path, cloudpickle.dumps({"error": described}))
        return 1


def _load(payload: Path) -> tuple[Any, Any, Any]:
    """Unpickle the payload; NotPicklable says what this node lacks and the ways out."""
    try:
        function, args, kwargs = cloudpickle.loads(payload.read_bytes())
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise NotPicklable(
            f"your function needs the module {error.name!r}, which this node does not have. Ways out: "
            "if it is your own code, ship it with runtime_env={'working_dir': '.'}; "
            f"if it is a package, install it with runtime_env={{'pip': [{package!r}]}}; "
            "or define the function in the notebook or script that submits it, which sends it by value.",
            module=error.name,
        ) from error
    except Exception as error:
        raise NotPicklable(
            f"your function or its arguments cannot be loaded here: {type(error).__name__}: {error}. "
            f"This node runs Python {sys.version_info.major}.{sys.version_info.minor}: submit from the same "
            "version, and with the same versions of the packages that the arguments need (runtime_env 'pip')."
        ) from error
    return function, args, kwargs


def _call(function: Any, args: Any, kwargs: Any) -> Any:
    """The function's value; a coroutine is run to its end."""
    value = function(*args, **kwargs)
    if isinstance(value, types.CoroutineType):
        import asyncio

        return asyncio.run(value)
    return value


def _pickle_result(value: Any) -> bytes:
    """The result file of a value; NotPicklable and PayloadTooLarge name the way out."""
    way_out = "Write it to a file in rm.checkpoint_dir() and return the path."
    try:
        pickled: bytes = cloudpickle.dumps({"ok": value})
    except Exception as error:
        raise NotPicklable(
            f"the function returned a {type(value).__qualname__}, which cannot be pickled "
            f"({type(error).__name__}: {error}). {way_out}"
        ) from error
    if len(pickled) > RESULT_LIMIT_BYTES:
        raise PayloadTooLarge(
            f"the function returned {len(pickled) / 2**20:.1f} MiB, and a result may have "
            f"{RESULT_LIMIT_BYTES // 2**20} MiB. {way_out}"
        )
    return pickled


def _describe(error: BaseException) -> dict[str, Any]:
    """An exception as plain data, readable also where its class cannot be imported."""
    kind = type(error)
    bare = kind.__module__ in {"builtins", "__main__"}
    return {
        "type": kind.__qualname__ if bare else f"{kind.__module__}.{kind.__qualname__}",
        "message": _text_of(error),
        "traceback": _users_traceback(error),
        "exception": _pickle_exception(error),
    }


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # a __str__ of user code
        return f"<{type(error).__name__} whose text raises {type(broken).__name__}>"


def _users_traceback(error: BaseException) -> str:
    """The traceback from the user's function on: the frames of this file and of asyncio.run tell nothing."""
    frame = error.__traceback__
    while frame is not None and _is_ours(frame.tb_frame.f_code.co_filename):
        frame = frame.tb_next
    if frame is None and isinstance(error, RequestError):
        return f"error: {error}\n"  # raised in this file, and its message says all
    return "".join(traceback.format_exception(type(error), error, frame))


def _is_ours(filename: str) -> bool:
    return filename == __file__ or f"{os.sep}asyncio{os.sep}" in filename


def _pickle_exception(error: BaseException) -> bytes | None:
    """The exception itself if it survives the journey, which is tried out here because many do not."""
    try:
        pickled: bytes = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)
    except Exception:
        return None
    return pickled if len(pickled) <= EXCEPTION_LIMIT_BYTES else None


def _exit_code(asked: SystemExit) -> int:
    """What the interpreter itself would exit with; a message is printed, as it would be."""
    if asked.code is None:
        return 0
    if isinstance(asked.code, int):
        return asked.code & 0xFF
    _say(f"{asked.code}\n")
    return 1


def _say(text: str) -> None:
    """To stderr, also if user code has closed or replaced sys.stderr."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except Exception:
        os.write(2, text.encode("utf-8", "replace"))


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: readers never see half a file."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_bytes(content)
    beside.replace(path)


if __name__ == "__main__":
    own = sys.argv[1:]
    del sys.argv[1:]  # user code that parses arguments finds none
    sys.exit(main(*own))
