"""Reading a job's logs from the store: all of it, or as it grows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rm.store import TOUCHED_S

if TYPE_CHECKING:
    from rm.job import Job

CHUNK_BYTES = 1 << 20
NEWS_S = 5.0
"""How long one wait for news lasts; between waits the job's status is looked at."""

DAY_S = 86_400.0

SETTLED_S = 90.0
"""More than a runner looks for a store that is away."""
PAUSE_S = 1.0
"""Between two looks where so many follow logs that the store does not wait for us."""


class LogReader:
    """The lines of one job, of every rank and stream asked for."""

    def __init__(self, job: Job, *, rank: int | None, stream: str | None) -> None:
        self._job = job
        self._rank = rank
        self._stream = stream
        self._offsets: dict[tuple[int, int, str], int] = {}
        self._partial: dict[tuple[int, int, str], bytes] = {}

    def read(self) -> list[str]:
        """What the last attempt has printed up to now, rank by rank."""
        self._settle()
        files = self._files()
        last = max((each.attempt for each in files), default=0)
        lines: list[str] = []
        for each in files:
            if each.attempt == last:
                lines += self._news(each)
                lines += self._rest(each)
        return lines

    def follow(self) -> Iterator[str]:
        """Every line as it comes, of this attempt and of later ones, until the job has ended."""
        while True:
            # The status first: what was printed before the end is then sure to be read.
            ended = self._job.view().ended
            if ended:
                self._settle()
            moved = False
            for each in self._files():
                for line in self._news(each):
                    moved = True
                    yield line
                if ended or each.closed:
                    yield from self._rest(each)
            if ended:
                return
            if not moved and not self._job._store("news", NEWS_S):
                time.sleep(PAUSE_S)

    def removed(self) -> str:
        """In a sentence, that the job's logs are not kept any more, and by which setting; "" where that is not so.

        A log that was begun is kept as a file, also an empty one, and none is removed within an hour of its end.
        """
        view = self._job.view()
        now = time.time() if view.as_of is None else view.as_of
        if view.ended_at is None or view.started_at is None or now - view.ended_at < TOUCHED_S:
            return ""
        if self._job._store("logs"):
            return ""
        hello = self._job._client.hello()
        days = hello["store_keep_days"]
        if now - view.ended_at >= days * DAY_S:
            return (
                f"the logs of {self._job.id} were removed: they are kept for {days:g} days (RM_STORE_KEEP_DAYS), "
                f"and it ended {(now - view.ended_at) / DAY_S:.0f} days ago"
            )
        return (
            f"the logs of {self._job.id} were removed: all logs and results together may take "
            f"{hello['store_keep_bytes'] / 2**30:g} GiB (RM_STORE_KEEP_BYTES), and the oldest go first"
        )

    def _settle(self) -> None:
        """The GPUs of a job that ended this moment are another's already, and its last lines may be on their way."""
        self._job._client._allocator("settled", self._job.id, timeout_s=SETTLED_S)

    def _files(self) -> list[Any]:
        files = [
            each
            for each in self._job._store("logs")
            if self._rank in (None, each.rank) and self._stream in (None, each.stream)
        ]
        return sorted(files, key=lambda each: (each.attempt, each.rank, each.stream != "out"))

    def _news(self, file: Any) -> Iterator[str]:
        """Whole lines that are new."""
        key = file.attempt, file.rank, file.stream
        while True:
            offset = self._offsets.get(key, 0)
            chunk = self._job._store("read_log", *key, offset, CHUNK_BYTES)
            if not chunk.data:
                return
            self._offsets[key] = chunk.next_offset
            *lines, rest = (self._partial.get(key, b"") + chunk.data).split(b"\n")
            self._partial[key] = rest
            for line in lines:
                yield self._show(file.rank, line)

    def _rest(self, file: Any) -> Iterator[str]:
        """The last line, where it has no newline."""
        rest = self._partial.pop((file.attempt, file.rank, file.stream), b"")
        if rest:
            yield self._show(file.rank, rest)

    def _show(self, rank: int, line: bytes) -> str:
        text = line.decode(errors="replace")
        several = self._rank is None and self._job.last.ranks > 1
        return f"[rank {rank}] {text}" if several else text
