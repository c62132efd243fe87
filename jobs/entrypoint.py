"""What every script here does before it trains: find the resource manager, read its flags, submit itself.

Standard library only. The process that merely submits may run on a CPU node without torch, and plain
`torchrun` on a machine without ray-rm.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

STOPPED = 128 + signal.SIGTERM
"""Exit status of a training that was told to stop and has kept its state: not finished, not failed."""


class _Alone:
    """Stands in for `rm` where it is not installed: no reports, and SIGTERM kills as it does any program."""

    @staticmethod
    def in_job() -> bool:
        return False

    @staticmethod
    def checkpoint_dir() -> Path:
        return Path(os.environ.get("RM_CHECKPOINT_DIR") or "checkpoints")

    @staticmethod
    def should_stop() -> bool:
        return False

    @staticmethod
    def checkpointed() -> None:
        pass

    @staticmethod
    def report(**_metrics: Any) -> None:
        pass

    @staticmethod
    def require_gpus(_num_gpus: float, *, detach: bool) -> None:  # noqa: ARG004 - as rm names it
        raise SystemExit("--num-gpus asks the resource manager for GPUs, and ray-rm is not installed here")


rm: Any
try:
    import rm
except ModuleNotFoundError as error:
    if error.name != "rm":  # it is there, and broken: that is for its owner to see
        raise
    rm = _Alone()


def submit_if_asked() -> None:
    """With --num-gpus, run this script with these arguments as a job; comes back only where it is to train.

    Call it before torch is imported. Under torchrun, and in a job, the GPUs are there already.
    """
    asked, _ = _submission_flags().parse_known_args()
    if asked.num_gpus is not None and not rm.in_job() and "RANK" not in os.environ:
        rm.require_gpus(asked.num_gpus, detach=asked.detach)


def training_flags(
    description: str, *, steps: int | None, batch_size: int, lr: float, checkpoint_every: int
) -> argparse.ArgumentParser:
    """The flags that all trainings share, with the defaults of one of them."""
    parser = argparse.ArgumentParser(
        description=description,
        parents=[_submission_flags()],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=_at_least_one, default=steps, help="optimizer steps in all")
    parser.add_argument("--batch-size", type=_at_least_one, default=batch_size, help="over all processes")
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-dir", type=Path, help="default: the job's, or ./checkpoints")
    parser.add_argument("--checkpoint-every", type=_at_least_one, default=checkpoint_every, metavar="STEPS")
    parser.add_argument("--step-delay", type=float, default=0.0, metavar="SECONDS", help="sleep a step")
    return parser


def _submission_flags() -> argparse.ArgumentParser:
    # No abbreviations, here and above: both parsers must read a command line in the same way.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num-gpus", type=_gpu_amount, help="run as a job with so many, or 0.5 of one")
    parser.add_argument("--detach", action="store_true", help="with --num-gpus: don't wait for the end")
    return parser


def _gpu_amount(text: str) -> int | float:
    amount = float(text)
    if not amount > 0 or (amount > 1 and not amount.is_integer()):
        raise argparse.ArgumentTypeError(f"{text}: a whole number of GPUs, or a share of one such as 0.5")
    return int(amount) if amount.is_integer() else amount


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is complete and on disk. Until then `path` stays as it was.

    What killed writers left is cleared away first: there is one writer, rank 0 of the one running attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
