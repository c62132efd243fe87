"""Plain files on the head node: blobs by content, logs by rank, results by job. Survives the allocator and Ray.

    blobs/<2 hex>/<64 hex>                      functions with their arguments, zipped working directories
    logs/<job>/<attempt>/<rank>.<stream>        what a rank printed
    logs/<job>/<attempt>/<rank>.<stream>.json   its `_Position`, once that is not simply the file's size
    results/<job>/<attempt>                     what a function returned
    drafts/                                     files on their way to their names

A log that would exceed its limit keeps its beginning and its end: the file has a hole in between, whose size readers
are told in its place. Where the file system knows no holes, only the beginning is kept.

`tidy` removes what is too old, and what is oldest where all of it takes too much, but nothing that a live job needs
and nothing that was touched within the last hour.

Blobs and results appear whole, forced to disk, or not at all. Logs are not forced: a crash of the machine may
cost their last moments, which the next batch then reveals as a gap. No file is held open between calls, so
there are never more open files than calls under way. One process works on a root at a time; within it, every
method may be called from any thread. A full or failing disk is an OSError of the system's own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rm import holes
from rm.errors import InvalidSpec

_JOB_ID = re.compile(r"[a-z][a-z0-9_-]{0,63}", re.ASCII)
_STREAM = re.compile(r"[a-z]{1,16}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LOG = re.compile(r"([0-9]+)\.([a-z]{1,16})", re.ASCII)
_NUMBER_MOST = 10**9
_OFFSET_MOST = 2**62
_READ_MOST = 64 * 2**20
_LOCKS = 64
TOUCHED_S = 3600.0
"""Whatever was written, or asked for by a submission, so lately is left alone."""
LastBatch = tuple[int, str, int, bytes]
"""Rank, stream, and the bytes of its log from that offset on."""
LogEnd = tuple[str, int, list[LastBatch]]
"""Job, attempt, and the last batches of some of its logs."""
BLOB_IDLE_S = 7 * 86_400.0
"""How long a blob that no live job needs is kept for the next one that may."""


@dataclass(frozen=True, slots=True)
class LogChunk:
    """A piece of a log. Read on from `next_offset`; with `closed` and no data, that was all."""

    data: bytes
    next_offset: int
    closed: bool


@dataclass(frozen=True, slots=True)
class LogFile:
    """One log of a job. `size` in bytes as kept; `closed`: it will not grow."""

    attempt: int
    rank: int
    stream: str
    size: int
    closed: bool


@dataclass(frozen=True, slots=True)
class Tidied:
    """What `tidy` has removed, in jobs, blobs and bytes on the disk, and what all that is left takes."""

    jobs: int
    blobs: int
    freed_bytes: int
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class _Removable:
    """Something that no live job needs. `at`: when it was last written."""

    at: float
    size: int
    paths: tuple[Path, ...]
    is_blob: bool


@dataclass(slots=True)
class _Position:
    """How far a stream has come: from byte `at` of the file on, it holds the stream from byte `stream` on.

    Both are 0 until something is missing. Where the file has reached its limit and can't have a hole, `at` is its size
    and `stream` moves on alone, by what is dropped. `cut`: where the hole ends; 0: there is none.
    """

    at: int = 0
    stream: int = 0
    dropped: int = 0
    closed: bool = False
    cut: int = 0


class FileStore:
    """All of a resource manager's files below `root`. The actor "store" owns it and calls it in threads."""

    def __init__(self, root: Path, max_log_bytes: int) -> None:
        """`max_log_bytes`: the most that one stream of one rank may keep. Clears what a crash left in drafts/."""
        self._root = root
        self._max_log_bytes = max_log_bytes
        self._head_bytes = max_log_bytes // 2
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._drafts = _directory(root / "drafts")
        for leftover in self._drafts.iterdir():
            leftover.unlink(missing_ok=True)
        self._holes = holes.works(self._drafts)

    # --- blobs -------------------------------------------------------------------------------------------

    def put_blob(self, data: bytes) -> str:
        """Keep `data`; returns its SHA-256, which is its name. Durable on return. Twice is once."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._blob(digest)
        if path.exists() and path.stat().st_size == len(data) and _touched(path):
            return digest
        self._write(path, data)
        return digest

    def has_blobs(self, digests: Collection[str]) -> set[str]:
        """Those of `digests` that are kept. They stay so for the submission that is about to name them."""
        return {digest for digest in digests if _touched(self._blob(digest))}

    def get_blob(self, digest: str) -> bytes:
        """The blob of this name. Raises FileNotFoundError, or OSError where the disk changed its content."""
        path = self._blob(digest)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            # Out of the way, so that the next upload of the same content mends it.
            path.unlink(missing_ok=True)
            raise OSError(errno.EIO, "the blob was damaged on disk and is removed: submit again", str(path))
        return data

    # --- results -----------------------------------------------------------------------------------------

    def put_result(self, job_id: str, attempt: int, data: bytes) -> None:
        """Keep what an attempt returned. Durable on return. Twice is once."""
        self._write(self._result(job_id) / str(_number(attempt, "attempt")), data)

    def get_result(self, job_id: str) -> bytes | None:
        """The result of the last attempt that has one, or None."""
        directory = self._result(job_id)
        attempts = [int(each.name) for each in directory.iterdir()] if directory.exists() else []
        return (directory / str(max(attempts))).read_bytes() if attempts else None

    # --- logs --------------------------------------------------------------------------------------------

    def append_log(self, job_id: str, attempt: int, rank: int, stream: str, offset: int, data: bytes) -> int:
        """Add `data`, which begins at byte `offset` of what the rank printed; returns where the next one begins.

        What is there already is not added again, so a batch may be sent as often as its sender likes. A gap is
        marked by a line of its own and stays one: bytes that come later for it are dropped. Beyond the limit the
        beginning is kept and the end, see above. A closed log takes nothing more.
        """
        path = self._log(job_id, attempt, rank, stream)
        _number(offset, "offset", most=_OFFSET_MOST)
        with self._writing(path) as position:
            return self._add(path, position, offset, data)

    def close_log(self, job_id: str, attempt: int, rank: int, stream: str) -> None:
        """Say that the rank prints no more. If anything was dropped, the last line says how much. Twice is once."""
        path = self._log(job_id, attempt, rank, stream)
        with self._writing(path) as position:
            self._close(path, position)

    def end_logs(self, job_id: str, attempt: int, last: list[LastBatch]) -> None:
        """The last batches of some of an attempt's logs, and their close: `append_log` and `close_log` for each."""
        for rank, stream, offset, data in last:
            path = self._log(job_id, attempt, rank, stream)
            _number(offset, "offset", most=_OFFSET_MOST)
            with self._writing(path) as position:
                self._add(path, position, offset, data)
                self._close(path, position)

    def end_all_logs(self, ends: list[LogEnd]) -> dict[int, str]:
        """`end_logs` for each. Returns those that could not be written, by their place in the list, and why."""
        failed: dict[int, str] = {}
        for place, end in enumerate(ends):
            try:
                self.end_logs(*end)
            except OSError as error:
                failed[place] = str(error)
        return failed

    def read_log(
        self, job_id: str, attempt: int, rank: int, stream: str, offset: int, max_bytes: int
    ) -> LogChunk:
        """Up to `max_bytes` of the log as kept, from byte `offset` on. A log that is not there yet is empty."""
        path = self._log(job_id, attempt, rank, stream)
        _number(offset, "offset", most=_OFFSET_MOST)
        _number(max_bytes, "max_bytes", most=_OFFSET_MOST)
        while True:
            # Before the bytes: closed then surely means that they are all there.
            position = _read_position(path)
            if self._head_bytes <= offset < position.cut:
                return LogChunk(self._cut_note(path, position, offset), position.cut, position.closed)
            if offset >= _size(path):
                return LogChunk(b"", offset, position.closed)
            most = min(max_bytes, _READ_MOST)
            if position.cut and offset < self._head_bytes:
                most = min(most, self._head_bytes - offset)
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(most)
            # The position is written before a hole is made: where it is as it was, these bytes were in none.
            if _read_position(path).cut == position.cut:
                return LogChunk(data, offset + len(data), position.closed)

    def logs(self, job_id: str) -> list[LogFile]:
        """Every log of the job, by attempt, rank and stream."""
        directory = self._root / "logs" / _job_id(job_id)
        found = []
        # Of one that holds nothing there is its position alone.
        for path in {path.with_name(path.name.removesuffix(".json")) for path in directory.glob("*/*")}:
            match = _LOG.fullmatch(path.name)
            if match is not None:
                position = _read_position(path)
                size = _size(path) - max(0, position.cut - self._head_bytes)
                found.append(LogFile(int(path.parent.name), int(match[1]), match[2], size, position.closed))
        return sorted(found, key=lambda each: (each.attempt, each.rank, each.stream))

    # --- tidying -----------------------------------------------------------------------------------------

    def tidy(
        self, live: Collection[str], needed: Collection[str], now: float, keep_s: float, keep_bytes: int
    ) -> Tidied:
        """Remove logs and results of jobs last written `keep_s` ago, and the oldest while all takes over `keep_bytes`.

        `live`: jobs of which everything stays. `needed`: blobs that stay; others go after a week. `now`: seconds since
        the epoch. Takes a look at every file.
        """
        found, total = self._look(set(live), set(needed))
        found = sorted((each for each in found if each.at < now - TOUCHED_S), key=lambda each: each.at)
        jobs = blobs = freed = 0
        for each in found:
            idle_s = min(keep_s, BLOB_IDLE_S) if each.is_blob else keep_s
            if each.at >= now - idle_s and total - freed <= keep_bytes:
                continue
            if each.is_blob and _written_at(each.paths[0]) >= now - TOUCHED_S:
                continue  # a submission has asked for it meanwhile
            for path in each.paths:
                _remove(path)
            freed += each.size
            jobs, blobs = jobs + (not each.is_blob), blobs + each.is_blob
        return Tidied(jobs, blobs, freed, total - freed)

    def _look(self, live: set[str], needed: set[str]) -> tuple[list[_Removable], int]:
        """What could be removed, and what all there is takes on the disk."""
        total = 0
        found: list[_Removable] = []
        of_jobs: dict[str, list[Path]] = {}
        for kind in ("logs", "results"):
            for path in _entries(self._root / kind):
                of_jobs.setdefault(path.name, []).append(path)
        for job_id, paths in of_jobs.items():
            weighed = [_weigh(path) for path in paths]
            at, size = max(each[0] for each in weighed), sum(each[1] for each in weighed)
            total += size
            if job_id not in live:
                found.append(_Removable(at, size, tuple(paths), is_blob=False))
        for directory in _entries(self._root / "blobs"):
            for path in _entries(directory):
                at, size = _weigh(path)
                total += size
                if path.name not in needed:
                    found.append(_Removable(at, size, (path,), is_blob=True))
        return found, total

    # --- one log ---------------------------------------------------------------------------------------------

    def _add(self, path: Path, position: _Position, offset: int, data: bytes) -> int:
        """`append_log`, for whom writes to the log at present."""
        if position.closed:
            return max(offset + len(data), position.stream)
        size = _size(path)
        if size < position.at:
            # The machine crashed: the end of the file is gone, what we knew about it is not.
            size = self._write_gap(path, position, "output was lost here in a crash", position.stream)
        expected, end = position.stream + size - position.at, offset + len(data)
        if end <= expected:
            return expected
        if offset > expected and (self._holes or size < self._max_log_bytes):
            lost = f"{offset - expected} bytes of output were lost here"
            size = self._write_gap(path, position, lost, offset)
            expected = offset
        new = data[max(0, expected - offset) :]
        kept = new if self._holes else new[: max(0, self._max_log_bytes - size)]
        if kept:
            _append(path, kept)
        if self._holes:
            self._cut(path, position, size + len(kept))
        dropped = end - expected - len(kept)
        if dropped:
            position.dropped += dropped
            position.at, position.stream = size + len(kept), end
            self._write_position(path, position)
        return end

    def _close(self, path: Path, position: _Position) -> None:
        """`close_log`, for whom writes to the log at present."""
        if position.closed:
            return
        size = _size(path)
        position.at, position.stream = size, position.stream + size - position.at
        position.closed = True
        limit = f"a log keeps {self._max_log_bytes} bytes (RM_MAX_LOG_BYTES)"
        words = f"{position.dropped} bytes more were printed and not kept: {limit}"
        if position.dropped:
            _append(path, _note(path, words))
        # After the last line: who reads `closed` has everything.
        self._write_position(path, position)

    # --- logs too long -----------------------------------------------------------------------------------

    def _cut(self, path: Path, position: _Position, size: int) -> None:
        """Give back the middle of a file that has become longer than the limit, not for every few bytes."""
        cut, begin = size - (self._max_log_bytes - self._head_bytes), max(position.cut, self._head_bytes)
        if cut - begin <= self._max_log_bytes // 16:
            return
        position.cut = cut
        self._write_position(path, position)
        holes.punch(path, begin, cut)

    def _cut_note(self, path: Path, position: _Position, offset: int) -> bytes:
        words = (
            f"{position.cut - offset} bytes of output were cut out here: of a log that is longer than "
            f"{self._max_log_bytes} bytes (RM_MAX_LOG_BYTES) the beginning and the end are kept"
        )
        return _on_a_line(path, offset, words)

    def _write_gap(self, path: Path, position: _Position, words: str, stream: int) -> int:
        """Mark that something is missing before byte `stream` of the stream; returns the file's new size."""
        note = _note(path, words)
        position.at, position.stream = _size(path) + len(note), stream
        # Before the line itself: a crash in between leaves a short file, which the next batch sees and mends.
        self._write_position(path, position)
        _append(path, note)
        return position.at

    # --- files -------------------------------------------------------------------------------------------

    def _blob(self, digest: str) -> Path:
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise InvalidSpec(f"sha256: {digest!r} is no SHA-256 in 64 hex digits", field="sha256")
        return self._root / "blobs" / digest[:2] / digest

    def _result(self, job_id: str) -> Path:
        return self._root / "results" / _job_id(job_id)

    def _log(self, job_id: str, attempt: int, rank: int, stream: str) -> Path:
        if not isinstance(stream, str) or not _STREAM.fullmatch(stream):
            raise InvalidSpec(f"stream: {stream!r} is no stream's name", field="stream")
        directory = self._root / "logs" / _job_id(job_id) / str(_number(attempt, "attempt"))
        return directory / f"{_number(rank, 'rank')}.{stream}"

    @contextmanager
    def _writing(self, path: Path) -> Iterator[_Position]:
        """One at a time per log, its directory there; where the stream stands."""
        with self._locks[hash(path) % _LOCKS]:
            _directory(path.parent)
            yield _read_position(path)

    def _write_position(self, path: Path, position: _Position) -> None:
        kept, text = _position_path(path), json.dumps(asdict(position)).encode()
        if not kept.exists():
            _create(kept, text)  # whoever reads half of it takes it for not there, as it was
            return
        draft = self._drafts / secrets.token_hex(8)
        _create(draft, text)
        draft.replace(kept)

    def _write(self, path: Path, data: bytes) -> None:
        """`data` at `path`, whole and durable, or an OSError and nothing."""
        _directory(path.parent)
        draft = self._drafts / secrets.token_hex(8)
        try:
            _create(draft, data, durable=True)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        with _opened(path.parent, os.O_RDONLY) as handle:
            os.fsync(handle)


def _job_id(job_id: str) -> str:
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):
        raise InvalidSpec(f"job_id: {job_id!r} is no job's id", field="job_id")
    return job_id


def _number(value: int, field: str, most: int = _NUMBER_MOST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise InvalidSpec(f"{field}: must be a whole number from 0 to {most}, not {value!r}", field=field)
    return value


def _touched(path: Path) -> bool:
    """Whether the file is there; then it counts as written now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def _weigh(path: Path) -> tuple[float, int]:
    """When anything at or below the path was last written, and the bytes that it takes on the disk."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0.0, 0
    at, size = found.st_mtime, found.st_blocks * 512
    if stat.S_ISDIR(found.st_mode):
        for below in _entries(path):
            newest, more = _weigh(below)
            at, size = max(at, newest), size + more
    return at, size


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _position_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_position(path: Path) -> _Position:
    try:
        return _Position(**json.loads(_position_path(path).read_bytes()))
    except FileNotFoundError:
        return _Position()
    except (ValueError, TypeError):
        return _Position()  # cut off by a crash of the machine: the file's size is the best we know


def _note(path: Path, words: str) -> bytes:
    """A line of our own in a log, on a line of its own."""
    return _on_a_line(path, _size(path), words)


def _on_a_line(path: Path, offset: int, words: str) -> bytes:
    """The line as it stands behind byte `offset` of the file."""
    start = b""
    if offset:
        with path.open("rb") as file:
            file.seek(offset - 1)
            start = b"" if file.read(1) == b"\n" else b"\n"
    return start + f"[rm: {words}]\n".encode()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _append(path: Path, data: bytes) -> None:
    with _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as handle:
        _write_all(handle, data)


def _create(path: Path, data: bytes, *, durable: bool = False) -> None:
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as handle:
        _write_all(handle, data)
        if durable:
            os.fsync(handle)


def _write_all(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)


def _directory(path: Path) -> Path:
    """The directory, made for the owner alone where it is missing."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        _directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
    return path
