"""Outlives the demo to clean up after it: `python -I -S reaper.py MARK DIRECTORY`, with a pipe from the demo as stdin.

The pipe ends when the demo does, however it does: returned, interrupted, killed. Then everything that it started is
given a moment to end by itself, what is left is killed, and its directory is removed. Processes are known by the
environment variable RM_DEMO=MARK, which all of them have inherited and nobody else has. Standard library only.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

VARIABLE = "RM_DEMO"
PATIENCE_S = 3.0
"""Ray's own processes end one another; so long they may take before they are killed."""
LIMIT_S = 20.0
LOOK_S = 0.05


def main(mark: str, directory: str) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # what ends the demo must not end its cleaning up
    sys.stdin.buffer.read()
    began = time.monotonic()
    while (left := marked(mark)) and time.monotonic() - began < LIMIT_S:
        if time.monotonic() - began > PATIENCE_S:
            for pid in left:
                kill(pid)
        time.sleep(LOOK_S)
    while Path(directory).exists() and time.monotonic() - began < LIMIT_S:
        shutil.rmtree(directory, ignore_errors=True)  # again where somebody still wrote into it


def marked(mark: str) -> list[int]:
    """The living processes that carry the mark, this one aside. Zombies have no environment any more."""
    wanted = f"{VARIABLE}={mark}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        try:
            if pid != os.getpid() and wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue  # gone meanwhile, or another user's
    return found


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
