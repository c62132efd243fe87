"""Holes in files: disk space in the middle is given back, and what stands before and behind keeps its place.

Linux only, and not on every file system (ext4, xfs, btrfs and tmpfs can, NFS before 4.2 can't).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_KEEP_SIZE, _PUNCH_HOLE = 1, 2


def punch(path: Path, start: int, end: int) -> None:
    """Make a hole of the bytes from `start` up to `end`: they read as zeros and take no space, but for parts of blocks.

    Raises OSError where the file or the file system can't have that.
    """
    if end <= start:
        return
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        raise OSError(f"this system can't make holes in files: {path}")
    handle = os.open(path, os.O_RDWR)
    try:
        length = ctypes.c_int64(end - start)
        if fallocate(handle, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_int64(start), length) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(handle)


def works(directory: Path) -> bool:
    """Whether files in the directory can have holes."""
    path = directory / f"holes-{os.getpid()}"
    try:
        path.write_bytes(b"x" * 8192)
        punch(path, 0, 4096)
        return path.read_bytes() == bytes(4096) + b"x" * 4096
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
