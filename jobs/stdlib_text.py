"""Text to learn from on any machine: the sources of Python's own standard library. No download."""

from __future__ import annotations

import math
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}


def stdlib_text(max_bytes: int) -> bytes:
    """The first `max_bytes` bytes of the standard library, its files in the order of their paths.

    The same on every machine with the same Python, so that all ranks and all attempts see the same text.
    """
    text = bytearray()
    for path in _sources(Path(sysconfig.get_path("stdlib"))):
        text += path.read_bytes()
        if len(text) >= max_bytes:
            return bytes(text[:max_bytes])
    raise SystemExit(f"{sysconfig.get_path('stdlib')} has only {len(text)} bytes of Python sources")


def _sources(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - NOT_STDLIB)
        yield from (Path(directory, name) for name in sorted(names) if name.endswith(".py"))


def vocabulary(text: bytes) -> bytes:
    """The different bytes of `text`, sorted: a byte's place here is its number for a model."""
    return bytes(sorted(set(text)))


def encode(text: bytes, known: bytes) -> bytes:
    """`text` with each byte replaced by its place in the vocabulary `known`."""
    return text.translate(bytes.maketrans(known, bytes(range(len(known)))))


def unigram_entropy(text: bytes) -> float:
    """The loss, in nats per byte, of a model that knows how frequent each byte is and nothing else."""
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log(count / len(text)) for count in counts)
