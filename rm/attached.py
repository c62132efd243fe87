"""Standing by a job: its logs on this terminal, its exit code as ours, our end as its end."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from rm.errors import RmError
from rm.job import Job
from rm.plain import plain

INTERRUPTED = 130


def follow_to_exit(job: Job) -> int:
    """Stream the job's logs until it ends; returns the exit code that a shell would have shown.

    Ctrl-C and SIGTERM cancel the job and wait for its end. A process that is killed outright can't do that: then
    its silence ends the job (`attach=True`).
    """
    previous = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        _announce(job)
        for line in job.logs(follow=True):
            print(line, flush=True)
        return _exit_code(job)
    except KeyboardInterrupt:
        print(f"\ncancelling {job.id} …", file=sys.stderr)
        try:
            job.cancel()
            job.wait(120)
        except (RmError, KeyboardInterrupt) as error:
            print(f"{job.id} may still be ending: {error}", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)


def _announce(job: Job) -> None:
    view = job.view()
    print(plain(f"{job.id} {view.name}: {view.gpus:g} GPU, {view.status}"), file=sys.stderr, flush=True)
    if view.status == "QUEUED":
        print(plain(f"{job.id} waits. {job.why()}"), file=sys.stderr, flush=True)


def _exit_code(job: Job) -> int:
    view = job.wait()
    if view.status == "SUCCEEDED":
        return 0
    outcome = view.outcome or {}
    print(plain(f"{job.id} {view.status}: {outcome.get('message', '')}"), file=sys.stderr, flush=True)
    if view.status == "FAILED" and outcome.get("exit_code"):
        return int(outcome["exit_code"])
    if view.status == "FAILED" and outcome.get("signal"):
        return 128 + int(outcome["signal"])
    return {"TIMED_OUT": 124, "CANCELLED": INTERRUPTED}.get(view.status, 1)


def _as_interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
