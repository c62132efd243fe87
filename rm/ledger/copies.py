"""Copies of a SQLite ledger: taken while an allocator writes it, and put back when none does.

A copy comes to be under another name, is looked through, is forced to disk, and gets its name last. It is one file
without a write-ahead log. Putting one back never deletes what was there.

Two marks keep a restored ledger from harm. Its file is exchanged while this process holds the lock that SQLite itself
takes to be alone with a file, so no allocator can have it open. And it gives no number again that a job after
the backup may have had, whose logs, results and checkpoints are still there under its id.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import sqlite3
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from sqlalchemy import URL, Connection
from sqlalchemy.exc import SQLAlchemyError

from rm.errors import InvalidSpec, LedgerUnavailable, RequestError
from rm.ledger import sqlite
from rm.ledger.checking import Summary, check, summarise
from rm.ledger.database import parse_url, unavailable
from rm.ledger.ledger import FIRST_SEQ

SKIPPED = 100_000
"""Numbers left out by a restored ledger where nobody knows which were given after the backup."""
BESIDE = ("-wal", "-shm", "-journal")
_LOCK_START, _LOCK_LENGTH = 0x40000000, 512
"""The bytes that SQLite locks: whoever has a ledger open holds some of them."""
_FLOCK = "hhqqi"
"""Linux's `struct flock`: kind, whence, start, length, process."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` did. `kept`: the files of the ledger that was there, under their new names."""

    path: str
    backup: Summary
    kept: tuple[str, ...]
    next_job: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def back_up(url: str, file: Path, *, force: bool = False) -> Summary:
    """Copy the ledger at `url` to `file`, mode 0600, as it is at one moment. It may be in use. Returns what is in it.

    `force` replaces a file that is there. Raises InvalidSpec for a file that can't be meant, RequestError for
    PostgreSQL, with the command to use, and LedgerUnavailable where the ledger or the copy is not sound.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        raise RequestError(
            f"the ledger is in PostgreSQL, whose own tools copy it: {dump_command(parsed, file)}",
            field="file",
        )
    path = sqlite.file_of(parsed)
    _require_place(file, path, force)
    with _draft(file) as draft:
        with sqlite.snapshot(path) as connection:
            there = summarise(connection, str(path))
            _copy(connection, path, draft)
        _require_sound(draft, path, there)
        sqlite.sync(draft)
        try:
            _publish(draft, file, force)
        except OSError as error:
            raise unavailable(
                str(path), f"copied to {file}", error, f"check the disk of {file.parent}"
            ) from error
    return there


def restore(url: str, file: Path, *, force: bool = False) -> Restored:
    """Put the backup in `file` where the ledger at `url` is. What was there is kept under a name with the time.

    Called in a process that does not have this ledger open. `force` takes a backup with findings, or one of another
    ledger. Raises InvalidSpec for a file that can't be meant, RequestError for PostgreSQL, LedgerUnavailable for a
    backup that is not sound, and where somebody has the ledger open.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        raise RequestError(
            "the ledger is in PostgreSQL, whose own tools put it back; `rmctl stop --keep-jobs` first, then: "
            f"{restore_command(parsed, file)}",
            field="file",
        )
    path = sqlite.file_of(parsed)
    if _same(file, path):
        raise InvalidSpec(f"file: {file} is the ledger itself", field="file")
    report = check(file)
    if report.findings and not force:
        first = "; ".join(map(str, report.findings[:3]))
        raise LedgerUnavailable(
            f"the backup {file} is not sound, {len(report.findings)} findings ({first}): `rmctl ledger check` lists "
            "them; take another backup, or this one as it is with --force"
        )
    with _alone(path):
        pass  # now rather than after the copying
    known = _known(path)
    if known is not None and known.key != report.summary.key and not force:
        raise LedgerUnavailable(
            f"{file} is a backup of another ledger: its key is {report.summary.key}, that of {path} is {known.key}; "
            "--force restores it all the same"
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _draft(path) as draft:
        with sqlite.snapshot(file) as connection:
            summary = summarise(connection, str(file))
            _copy(connection, file, draft)
        number = max(summary.next_job, known.next_job) if known else summary.next_job + SKIPPED
        try:
            _number_from(draft, number)
            _give_owner(draft, path)
            sqlite.sync(draft)
            with _alone(path):
                kept = _exchange(draft, path)
        except (OSError, sqlite3.Error) as error:
            raise unavailable(str(path), "restored", error, f"check the disk of {path.parent}") from error
    return Restored(str(path), summary, kept, number)


def dump_command(url: URL, file: Path) -> str:
    """The command that backs up a ledger in PostgreSQL. Without the password."""
    words = ["pg_dump", "--format=custom", "--no-owner", f"--file={file}", f"--dbname={_plain(url)}"]
    schema = _search_path(url)
    return shlex.join([*words, f"--schema={schema}"] if schema else words) + _password_advice(url)


def restore_command(url: URL, file: Path) -> str:
    """The command that puts such a backup back. Without the password."""
    words = [
        "pg_restore",
        "--clean",
        "--if-exists",
        "--no-owner",
        "--single-transaction",
        f"--dbname={_plain(url)}",
    ]
    return shlex.join([*words, str(file)]) + _password_advice(url)


# --- copying -------------------------------------------------------------------------------------------------


@contextmanager
def _draft(file: Path) -> Iterator[Path]:
    """An empty file beside `file`, for its owner only; gone at the end unless it got another name."""
    try:
        draft = sqlite.new_draft(file)
    except OSError as error:
        why = error.strerror or error
        raise InvalidSpec(f"file: {file.parent} can't be written: {why}", field="file") from None
    try:
        yield draft
    finally:
        for suffix in ("", *BESIDE):
            draft.with_name(draft.name + suffix).unlink(missing_ok=True)


def _copy(source: Connection, path: Path, draft: Path) -> None:
    """Every page as the source's transaction sees it. A writer goes on meanwhile."""
    raw = cast("sqlite3.Connection", source.connection.driver_connection)
    target = sqlite3.connect(draft, isolation_level=None)
    try:
        raw.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")  # one file, complete by itself
    except sqlite3.Error as error:
        raise unavailable(
            str(path), "copied", error, f"check that the disk of {draft.parent} has room"
        ) from error
    finally:
        target.close()


def _require_sound(draft: Path, path: Path, there: Summary) -> None:
    with sqlite.snapshot(draft) as copy:
        damage = sqlite.damage(copy)
        if damage:
            raise LedgerUnavailable(
                f"the ledger {path} is damaged, and so is every copy of it ({damage[0]}): `rmctl ledger check` tells "
                "more; restore an older backup"
            )
        copied = summarise(copy, str(draft))
    if copied != there:
        raise LedgerUnavailable(f"the copy of {path} holds {copied}, not {there}: try again")


def _require_place(file: Path, path: Path, force: bool) -> None:
    if _same(file, path):
        raise InvalidSpec(f"file: {file} is the ledger itself", field="file")
    if file.is_dir():
        raise InvalidSpec(f"file: {file} is a directory; name a file in it", field="file")
    for suffix in BESIDE:
        if file.with_name(file.name + suffix).exists():
            raise InvalidSpec(
                f"file: {file} is in use: {file.name}{suffix} is beside it; choose another name", field="file"
            )
    if file.exists() and not force:
        raise _taken(file)


def _publish(draft: Path, file: Path, force: bool) -> None:
    if force:
        draft.replace(file)
    else:
        try:
            os.link(draft, file)
        except FileExistsError:
            raise _taken(file) from None
        except OSError:  # a file system without hard links
            if file.exists():
                raise _taken(file) from None
            draft.rename(file)
    sqlite.sync(file.parent)


def _taken(file: Path) -> InvalidSpec:
    return InvalidSpec(f"file: {file} exists; choose another name, or --force replaces it", field="file")


def _same(file: Path, path: Path) -> bool:
    return file.absolute() == path.absolute() or (file.exists() and path.exists() and file.samefile(path))


# --- exchanging ----------------------------------------------------------------------------------------------


def _known(path: Path) -> Summary | None:
    """What the ledger that is there holds; None where there is none, or none that can be read."""
    try:
        with sqlite.snapshot(path) as connection:
            return summarise(connection, str(path))
    except (LedgerUnavailable, SQLAlchemyError):
        return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Nobody has the file open as a database while this lasts. Raises LedgerUnavailable where somebody has.

    SQLite's own lock, taken by hand: it works for a file that SQLite can't read any more. It ends when this process
    closes the file anywhere, so nothing in the block may open it.
    """
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield
        return
    except OSError as error:
        raise unavailable(str(path), "restored", error, "do it as the user who runs Ray") from error
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, _LOCK_LENGTH, _LOCK_START)
        except OSError:
            raise LedgerUnavailable(
                f"the ledger {path} is in use by {_holder(handle)}: end the allocator with `rmctl stop --keep-jobs`, "
                "and whatever else has it open, then try again"
            ) from None
        yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _LOCK_START, _LOCK_LENGTH, 0)
    pid = struct.unpack(_FLOCK, fcntl.fcntl(handle, fcntl.F_GETLK, asked))[4]
    try:
        line = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        words = " ".join(line.replace("\0", " ").split())
    except OSError:
        return "another process"
    return f"process {pid} ({words[:60]})"


def _number_from(draft: Path, number: int) -> None:
    """Let the draft's next job have this number."""
    connection = sqlite3.connect(draft)
    try:
        connection.execute(
            "INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", (FIRST_SEQ, str(number))
        )
        connection.commit()
    finally:
        connection.close()


def _give_owner(draft: Path, path: Path) -> None:
    """To whom the ledger belongs: root may be restoring it for another user."""
    if os.geteuid() == 0:
        model = (path if path.exists() else path.parent).stat()
        os.chown(draft, model.st_uid, model.st_gid)


def _exchange(draft: Path, path: Path) -> tuple[str, ...]:
    """Put the draft in the ledger's place. The ledger's name is never without a file in between, if it had one."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.replaced-{stamp}-{secrets.token_hex(2)}")
    kept = []
    # The log first: beside another file of this name it would be taken for that file's.
    for suffix in BESIDE:
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            kept.append(str(beside.rename(aside.with_name(aside.name + suffix))))
    if path.exists():
        try:
            os.link(path, aside)
        except OSError:  # a file system without hard links
            path.rename(aside)
        kept.insert(0, str(aside))
    draft.replace(path)
    sqlite.sync(path.parent)
    return tuple(kept)


# --- PostgreSQL ----------------------------------------------------------------------------------------------


def _plain(url: URL) -> str:
    """The URL as PostgreSQL's own programs take it, without the password."""
    return url._replace(drivername="postgresql", password=None).render_as_string(hide_password=False)


def _search_path(url: URL) -> str:
    option = str(url.query.get("options", ""))
    return option.partition("search_path=")[2].split(" ")[0].split(",")[0]


def _password_advice(url: URL) -> str:
    return " (it finds the password in ~/.pgpass or PGPASSWORD)" if url.password else ""
