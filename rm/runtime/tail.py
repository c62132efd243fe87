"""Reading log files that are still being written: `Tail` ships them in pieces, `last_lines` quotes the end.

User code writes what it likes: nothing here assumes text, lines or a bound on either. The runner calls both.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from rm.holes import punch

LINE_LIMIT_CHARS = 2_000
_COLOURS = re.compile(r"\x1b\[[0-9;:?]*[ -/]*[@-~]")
_CONTROLS = dict.fromkeys([*range(9), *range(10, 32), 127], "\ufffd")  # but not tab; databases refuse NUL


class Tail:
    """Reads a growing file piece by piece, each byte once. It need not exist yet; between reads it is closed.

    A file that has become shorter was emptied and is read again from its start.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.offset = 0  # bytes read so far
        self._forgotten = 0  # where the hole that `forget` has made ends

    def read(self, max_bytes: int) -> bytes:
        """The next bytes, `max_bytes` at most, b"" if nothing is new. May end amid a line or a character."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset = 0
                file.seek(self.offset)
                got = file.read(max_bytes)
        except FileNotFoundError:
            return b""
        self.offset += len(got)
        return got

    def behind(self) -> int:
        """How many bytes are there and have not been read."""
        try:
            return max(0, self.path.stat().st_size - self.offset)
        except FileNotFoundError:
            return 0

    def skip(self, count: int) -> None:
        """Go on as if the next `count` bytes had been read."""
        self.offset += count

    def forget(self, keep_bytes: int, step_bytes: int) -> None:
        """Give back the disk space of what was read, but for the last `keep_bytes`, whenever it is `step_bytes`.

        Where the file system can't do that, nothing happens.
        """
        end = self.offset - keep_bytes
        if end - self._forgotten < step_bytes:
            self._forgotten = min(self._forgotten, max(0, end))  # the file was emptied
            return
        with contextlib.suppress(OSError):
            punch(self.path, self._forgotten, end)
        self._forgotten = end

    @property
    def drained(self) -> bool:
        """Whether all that is in the file now has been read. Final once nobody writes to it any more."""
        try:
            return self.path.stat().st_size == self.offset
        except FileNotFoundError:
            return True


def last_lines(path: str | Path, n: int, max_bytes: int = 64 * 1024) -> list[str]:
    """The last `n` lines of a file as clean text, out of its last `max_bytes`; [] if there is no such file.

    Bytes that are no text become U+FFFD, colours are dropped, lines cut at LINE_LIMIT_CHARS. Of a progress
    bar, which rewrites its line with carriage returns, only the latest state is kept.
    """
    try:
        with Path(path).open("rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - max_bytes)
            file.seek(start)
            content = file.read(max_bytes)
    except FileNotFoundError:
        return []
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()  # the file ends with a line's end, not with an empty line
    if start and len(lines) > 1:
        lines.pop(0)  # cut somewhere in its middle
    return [_clean(line) for line in lines[max(0, len(lines) - n) :]]


def _clean(line: bytes) -> str:
    """What a terminal would show of a line."""
    latest = line.rstrip(b"\r").rpartition(b"\r")[2]
    text = _COLOURS.sub("", latest.decode("utf-8", "replace")).translate(_CONTROLS)
    return text if len(text) <= LINE_LIMIT_CHARS else text[: LINE_LIMIT_CHARS - 1] + "…"
