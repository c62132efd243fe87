"""A place of the demo's own: a directory, and a Ray that ends with it. Nothing of it stays, whatever happens."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rm.demo.reaper import LIMIT_S, VARIABLE
from rm.errors import ClusterError

if TYPE_CHECKING:
    from rm.runtime.local import LocalRay

LOGICAL_GPUS = 2
REAPER = Path(__file__).with_name("reaper.py")


@contextmanager
def private_directory() -> Iterator[Path]:
    """A temporary directory. When the block ends, or this process in any way, a reaper ends what was started in
    it and removes it. The block's end waits for that.
    """
    mark = secrets.token_hex(16)
    directory = Path(tempfile.mkdtemp(prefix="rmd-", dir="/tmp"))  # short: Ray makes sockets in it
    # Its own session: Ctrl-C goes to the whole foreground group, and cleaning up must not be interrupted.
    reaper = subprocess.Popen(
        [sys.executable, "-I", "-S", str(REAPER), mark, str(directory)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    os.environ[VARIABLE] = mark  # inherited by all that is started from here on
    try:
        yield directory
    finally:
        del os.environ[VARIABLE]
        assert reaper.stdin is not None
        reaper.stdin.close()
        reaper.wait(LIMIT_S + 10)


@contextmanager
def local_ray(directory: Path, num_gpus: int | None) -> Iterator[LocalRay]:
    """A Ray with so many GPUs, else the machine's, else two that are only counted. It ends with the block."""
    from rm.runtime.local import LocalRay

    if num_gpus is None and not _has_gpus():
        num_gpus = LOGICAL_GPUS
    with LocalRay.start(num_gpus, temp_dir=directory, fate_share=True, dashboard=False) as local:
        yield local


def _has_gpus() -> bool:
    from ray._private.accelerators import get_accelerator_manager_for_resource

    return bool(get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators())


def training_scripts() -> Path:
    """Where the training entrypoints lie: in `rm/_jobs` of an installed wheel, in `jobs` beside `rm` in the sources."""
    package = Path(__file__).resolve().parents[1]
    for place in (package / "_jobs", package.parent / "jobs"):
        if (place / "train_digits.py").is_file():
            return place
    raise ClusterError(
        f"the training scripts are neither in {package / '_jobs'} nor beside {package}: install anew"
    )


def training(num_gpus: int) -> tuple[list[str], str | int, str]:
    """What to train on so many GPUs: the command, its processes per node, and a sentence about it."""
    if find_spec("torch") and find_spec("sklearn"):
        batch = num_gpus * max(1, 64 // num_gpus)  # must divide by the number of ranks
        command = ["python", "train_digits.py", "--epochs", "8", "--batch-size", str(batch)]
        return (
            command,
            "gpu",
            "a small convolutional network on handwritten digits (PyTorch), one process per GPU",
        )
    command = ["python", "train_chars.py", "--step-delay", "0.005"]
    missing = "torch and scikit-learn are" if not find_spec("torch") else "scikit-learn is"
    sentence = (
        f"a table of letter pairs, in Python alone, since {missing} not installed: pip install ray-rm[train]"
    )
    return command, 1, sentence
