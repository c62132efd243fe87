"""What code inside a job may ask and say: who am I, where do I keep my work, must I stop, how far am I.

Standard library only and nothing of ours, so that user code pays nothing for it. Everything comes from
environment variables that the runner sets for each process of an attempt, and everything has a default, so
that the same script runs outside a job as well:

    RM_JOB_ID          the job, "j17"
    RM_ATTEMPT         the attempt, "j17.1"
    RM_CHECKPOINT_DIR  a directory that is kept from attempt to attempt
    RM_STOP_FILE       a path that comes into being when the job should stop, before SIGTERM is sent
    RM_REPORT_FILE     where this process leaves its latest metrics
    RM_ARRAY_INDEX, RM_ARRAY_SIZE  which job of an array this is, of how many
    RANK, LOCAL_RANK, WORLD_SIZE   as torchrun sets them
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

Scalar = bool | int | float | str | None

STAT_INTERVAL_S = 0.05
"""How often `should_stop` looks at the stop file, at most."""

WRITE_INTERVAL_S = 0.05
"""How often `report` writes its file, at most."""

MOST_METRICS = 200
"""Names that one process may report; further ones are left out. With the next bound: what a report can weigh."""

MOST_CHARS = 200
"""Of a name or a text that is reported; what is beyond is cut off."""


# --- who am I ----------------------------------------------------------------------------------------------


def in_job() -> bool:
    """Whether this process belongs to a job of the resource manager."""
    return bool(os.environ.get("RM_JOB_ID"))


def job_id() -> str | None:
    """The id of the job, such as "j17". None outside a job."""
    return os.environ.get("RM_JOB_ID") or None


def attempt() -> int:
    """Which attempt of the job this is: 1 at first, one more after each requeue. 1 outside a job."""
    _, _, number = os.environ.get("RM_ATTEMPT", "").rpartition(".")
    return int(number) if number.isdecimal() else 1


def rank() -> int:
    """This process among all processes of the job, from 0."""
    return int(os.environ.get("RANK") or 0)


def local_rank() -> int:
    """This process among those of the job on the same node, from 0: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def world_size() -> int:
    """How many processes the job has on all its nodes together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def array_index() -> int:
    """Which job of its array this is, from 0. 0 outside an array."""
    return int(os.environ.get("RM_ARRAY_INDEX") or 0)


def array_size() -> int:
    """How many jobs the array has. 1 outside an array."""
    return int(os.environ.get("RM_ARRAY_SIZE") or 1)


# --- where do I keep my work -------------------------------------------------------------------------------


def checkpoint_dir() -> Path:
    """The directory to keep checkpoints in, created if missing. A later attempt of the job finds them there.

    Outside a job it is `./checkpoints`, unless RM_CHECKPOINT_DIR says otherwise.
    """
    directory = Path(os.environ.get("RM_CHECKPOINT_DIR") or "checkpoints")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


# --- must I stop -------------------------------------------------------------------------------------------


class _Stop:
    """Remembers that a stop was asked for: once asked, it is never taken back."""

    def __init__(self) -> None:
        self._asked = False
        self._armed = False
        self._looked_at = -math.inf  # monotonic seconds
        self._mask = threading.local()  # each thread has its own signal mask, and may fork

    def asked(self) -> bool:
        if not self._armed:
            self._arm()
        if self._asked:
            return True
        now = time.monotonic()
        if now - self._looked_at >= STAT_INTERVAL_S:
            self._looked_at = now
            path = os.environ.get("RM_STOP_FILE")
            # Only ever set, never assigned the answer: a SIGTERM may arrive during the look.
            if path and Path(path).exists():
                self._asked = True
        return self._asked

    def _arm(self) -> None:
        """Take SIGTERM over, unless someone has. Python lets only the main thread do so."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_sigterm)
        self._armed = True

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    # In a forked child SIGTERM kills again: pools and data loaders end their workers that way. It is held back
    # during the fork, or a worker that is ended at birth would take it for a note to stop, and live.

    def before_fork(self) -> None:
        self._mask.before_fork = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def forked_parent(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask.before_fork)

    def forked_child(self) -> None:
        self._armed = False
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask.before_fork)


_stop = _Stop()
os.register_at_fork(
    before=_stop.before_fork, after_in_parent=_stop.forked_parent, after_in_child=_stop.forked_child
)


def should_stop() -> bool:
    """Whether the job was asked to stop: save what you need and exit. Cheap enough for every step.

    True from the moment the stop file exists or this process got SIGTERM; it stays true. SIGTERM is noticed
    only from the first call in the main thread on: that call replaces SIGTERM's default action, which would
    kill the process at once, by a note to stop. So **call it once before the loop**, and then at every step.
    A program that has a SIGTERM handler of its own keeps it, and learns of a stop from the stop file, which
    is there before the signal. Forked children get the default action back.

    In a gang the processes don't notice at the same step: agree on it (all-reduce the answer) before leaving.
    """
    return _stop.asked()


# --- how far am I ------------------------------------------------------------------------------------------


class _Reporter:
    """The latest metrics of this process, and when they were last written."""

    def __init__(self) -> None:
        # Reentrant, so that a signal handler that reports can't lock itself out.
        self._lock = threading.RLock()
        self._metrics: dict[str, Scalar] = {}
        self._at = 0.0  # unix seconds of the latest report
        self._checkpoint_at: float | None = None  # unix seconds
        self._checkpoint_monotonic = 0.0  # the same moment, seconds on this node's monotonic clock
        self._pending = False
        self._written_at = -math.inf  # monotonic seconds
        self._checkpoint_written_at = (
            -math.inf
        )  # the same, of the latest file that told of a checkpoint at once
        self._registered = False
        self._complained = False

    def report(self, metrics: dict[str, Scalar], *, checkpoint: bool = False) -> None:
        with self._lock:
            self._metrics.update(metrics)
            if len(self._metrics) > MOST_METRICS:
                self._metrics = dict(islice(self._metrics.items(), MOST_METRICS))
                self._complain(f"only the first {MOST_METRICS} metrics are kept")
            self._at = time.time()
            if checkpoint:
                self._checkpoint_at = self._at
                self._checkpoint_monotonic = time.monotonic()
            self._pending = True
            if not self._registered:
                self._registered = True
                atexit.register(self.flush)
            now = time.monotonic()
            if checkpoint and now - self._checkpoint_written_at >= WRITE_INTERVAL_S:
                self._checkpoint_written_at = now
                self.flush()
            elif now - self._written_at >= WRITE_INTERVAL_S:
                self.flush()

    def flush(self) -> None:
        """Write what is pending. A failure is said once on stderr, and never reaches the training."""
        with self._lock:
            path = os.environ.get("RM_REPORT_FILE")
            if not self._pending or not path:
                return
            # Set before the attempt, so that a full disk is tried at the same rate as a good one.
            self._written_at = time.monotonic()
            self._pending = False
            try:
                said: dict[str, Any] = {"at": self._at, "metrics": self._metrics}
                if self._checkpoint_at is not None:
                    said["checkpoint_at"] = self._checkpoint_at
                    said["checkpoint_monotonic"] = self._checkpoint_monotonic
                _replace_text(Path(path), json.dumps(said))
            except (OSError, ValueError) as error:
                self._pending = True
                self._complain(f"metrics can't be written, training goes on: {error}")

    def _complain(self, words: str) -> None:
        if not self._complained:
            self._complained = True
            # stderr may be full, closed or None.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                print(f"rm: {words}", file=sys.stderr)

    def forked(self) -> None:
        """In a forked child: what the parent has not written yet is the parent's, and so may be the lock."""
        self._lock = threading.RLock()
        self._metrics = {}
        self._pending = False
        self._checkpoint_at = None


_reporter = _Reporter()
os.register_at_fork(after_in_child=_reporter.forked)


def report(**metrics: Any) -> None:
    """Tell how far this process is: `report(step=120, total=1000, loss=0.31)`.

    Values are numbers, strings, booleans or None; one-element arrays and tensors count as numbers (reading
    one from a GPU waits for the GPU). Anything else is a TypeError that names the metric. Each call is merged
    into what was reported before. `step` together with `total` is what progress bars show.

    Call it at every step: at most every 50 ms the latest values replace the report file. Values from calls in
    between are written by the first call after that, or when the interpreter exits; a process that is killed
    loses those. At most 200 metrics are kept, and 200 characters of a text. Safe from any thread. Outside a job it
    does nothing, and a full disk never breaks a training.
    """
    if os.environ.get("RM_REPORT_FILE"):
        _reporter.report({name[:MOST_CHARS]: _scalar(name, value) for name, value in metrics.items()})


def checkpointed() -> None:
    """Say that this process has just saved all that a later attempt needs to go on from here.

    When GPUs are needed for somebody who comes first, those who lose least are stopped: what counts is the time since
    the last checkpoint. Call it in rank 0 after each; outside a job it does nothing.
    """
    if os.environ.get("RM_REPORT_FILE"):
        _reporter.report({}, checkpoint=True)


def _scalar(name: str, value: Any) -> Scalar:
    """`value` as JSON can hold it. NaN and the infinities, which JSON has no numbers for, become strings."""
    if isinstance(value, str):
        return value[:MOST_CHARS]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    item = getattr(value, "item", None)
    if callable(item):
        try:
            plain = item()
        except (ValueError, RuntimeError, TypeError) as error:
            raise TypeError(f"report({name}=…): only a single value can be reported: {error}") from error
        if isinstance(plain, bool | int | float | str):
            return _scalar(name, plain)
    raise TypeError(f"report({name}=…): {type(value).__name__} is no number, string, bool or None")


def _replace_text(path: Path, text: str) -> None:
    """Readers see the old content or the new, never half of it. The process id keeps two writers apart."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
