"""A nursery whose interpreter has imported what functions import: `python -m rm.runtime.preloaded MODULE…`.

Importing PyTorch takes seconds; forking a process that has it takes milliseconds. This process imports the modules,
says which it has then, and forks keepers like any nursery (`keeper`). A rank that is a function then goes on in its
fork of this interpreter, and no user code has ever run in what it is forked from. `rm.runtime.preloading` starts this
with the environment that such ranks have, and decides whether a rank may come from here.

What a new process would have and a fork has not is made up for: the mark by which its processes are found, the seeds of
random generators, signal handlers, sys.path. Nothing here may start a thread or touch a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from rm.runtime import entry, keeper

MARK = keeper.ATTEMPT_KEY
ROOM = 256
"""Bytes that are kept free for the mark in the memory that /proc shows as this process's environment."""
MOST_FILES = 1 << 16
ENV_START = 47
"""Of /proc/PID/stat: which field behind the name's bracket is the environment's address; proc(5) counts it as 50."""


def main(modules: list[str]) -> None:
    """Preload, and fork until the runner is gone. Returns in a rank, when its function has ended, by SystemExit."""
    path = sys.path[0 if sys.flags.safe_path else 1 :]
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: S112 - the function that imports it will tell its user why it can't be
            continue
    gc.collect()
    gc.freeze()  # what is shared stays shared: a collection in a fork would write to all of it
    with socket.socket(fileno=os.dup(0)) as runner, contextlib.suppress(BrokenPipeError):
        runner.send(json.dumps(origins()).encode())
    keeper.enter = take_on
    try:
        keeper.main(as_nursery=True)
    except keeper.Entered as entered:
        arguments = entered.arguments
    # Out of the handler: what the function raises must not be told as having come on top of this.
    os.closerange(3, MOST_FILES)
    sys.path[:] = [*([] if sys.flags.safe_path else [str(Path.cwd())]), *path]
    sys.argv[:] = [entry.__file__]
    sys.exit(entry.main(*arguments))


def origins() -> dict[str, str]:
    """The files of the top-level modules that are loaded. Those without one come before all of sys.path, always."""
    files = {
        name: getattr(module, "__file__", None) for name, module in sys.modules.items() if "." not in name
    }
    return {name: file for name, file in files.items() if file}


def take_on(order: dict[str, Any]) -> bool:
    """In the rank: its environment, and all else in which a fork differs from a new process."""
    if not mark(order["env"].get(MARK, "")):
        return False
    os.environ.clear()
    os.environ.update(order["env"])
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)  # as every Python has them
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    keeper.call_oneself(b"python")
    return True


def mark(key: str) -> bool:
    """Make /proc show this process as having MARK=key in its environment. False where it does not then."""
    import ctypes

    with open("/proc/self/stat", "rb") as file:  # noqa: PTH123 - as in the keeper
        stat = file.read()
    begin = int(stat[stat.rindex(b")") + 2 :].split()[ENV_START])
    found = _environment().find(f"\0{MARK}=".encode())
    value = key.encode()
    if not begin or found < 0 or len(value) >= ROOM:
        return False
    ctypes.memmove(begin + found + len(MARK) + 1, value.ljust(ROOM, b"\0"), ROOM)
    return f"\0{MARK}={key}\0".encode() in _environment()


def _environment() -> bytes:
    with open("/proc/self/environ", "rb") as file:  # noqa: PTH123
        return b"\0" + file.read()


if __name__ == "__main__":
    main(sys.argv[1:])
