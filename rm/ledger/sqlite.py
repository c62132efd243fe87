"""The ledger in a SQLite file: write-ahead log, every commit forced to disk, one writer and many readers.

A ledger comes to be under another name and gets its own once it is complete. So a file that is there is a
ledger, or was: an empty, cut or foreign one is an error and never an invitation to start anew, which would
forget every job without a word.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection as SqliteConnection
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, QueuePool, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from rm.errors import LedgerUnavailable
from rm.ledger.database import READERS, WAIT_S, Database, unavailable
from rm.ledger.schema import create, upgrade

_WAL = "PRAGMA journal_mode = WAL"
_DURABLE = ("PRAGMA synchronous = FULL", "PRAGMA fullfsync = ON")
"""A commit is on the disk when it returns. (fullfsync: what that takes on macOS.)"""


def open_sqlite(url: URL) -> Database:
    """The ledger at `url`, made if there is none. Raises LedgerUnavailable."""
    path = file_of(url)
    name = str(path)
    advice = f"check that the disk of {path.parent} has room and that this user may write there"
    try:
        if not path.exists():
            _make(url, path)
        _require_content(path)
    except OSError as error:
        raise unavailable(name, "opened", error, advice) from error
    writer = _engine(url, _WAL, *_DURABLE)
    reader = _engine(url, "PRAGMA query_only = ON", connections=READERS)
    database = Database(name, advice, writer, reader)
    try:
        with database.transaction("opened") as connection:
            _require_intact(connection, name)
            upgrade(connection, name)
    except BaseException:
        database.close()
        raise
    return database


def file_of(url: URL) -> Path:
    """The file that a SQLite URL names. Raises LedgerUnavailable where it names none."""
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise LedgerUnavailable(f"the ledger's URL {url} names no file: use sqlite:////path/to/ledger.sqlite")
    return Path(url.database)


@contextmanager
def snapshot(path: Path) -> Iterator[Connection]:
    """The file as it is at one moment, for reading only: nothing is made, mended or upgraded.

    A write-ahead log beside the file belongs to it and is left as it is. Text that is no UTF-8 is read as far as it
    goes, so that one bad byte does not hide the rest. Raises LedgerUnavailable.
    """
    name = str(path)
    advice = (
        "check that this user may read it, and write in its directory; if it is damaged, restore a backup "
        "(`rmctl ledger restore`)"
    )
    log = path.with_name(path.name + "-wal")
    try:
        _require_content(path)
        mode = (
            "ro" if log.exists() else "rw"
        )  # rw takes away the empty log that reading makes; it writes nothing else
    except FileNotFoundError:
        raise LedgerUnavailable(
            f"there is no ledger at {name}: check the path, or RM_LEDGER_URL and RM_HOME"
        ) from None
    except OSError as error:
        raise unavailable(name, "read", error, advice) from error

    def connect() -> SqliteConnection:
        address = f"{path.absolute().as_uri()}?mode={mode}"
        made = sqlite3.connect(
            address, uri=True, timeout=WAIT_S, isolation_level=None, check_same_thread=False
        )
        made.execute("PRAGMA query_only = ON")
        made.text_factory = lambda data: data.decode(errors="surrogateescape")
        return made

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            yield connection
    except SQLAlchemyError as error:
        raise unavailable(name, "read", error, advice) from error
    finally:
        engine.dispose()


def damage(connection: Connection) -> list[str]:
    """What SQLite itself finds wrong with the file, up to 100 lines; empty where it is sound."""
    found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check(100)")]
    return [] if found == ["ok"] else found


def _require_content(path: Path) -> None:
    if path.stat().st_size == 0:
        raise LedgerUnavailable(
            f"the ledger {path} is empty: it was cut off, or it never was one; restore it from a backup, or "
            "delete it if it held nothing"
        )


def _make(url: URL, path: Path) -> None:
    """A new, complete ledger at `path`. If somebody else makes it at the same time, theirs stands."""
    for suffix in ("-wal", "-journal"):
        orphan = path.with_name(path.name + suffix)
        if orphan.exists() and not path.exists():  # asked last: somebody may be making it right now
            raise LedgerUnavailable(
                f"the ledger {path} is gone but {orphan} is still there: restore the ledger, or delete "
                f"{orphan.name} to start with an empty one"
            )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = new_draft(path)
    # With a rollback journal: the draft is then one file, complete by itself, which a rename can publish.
    engine = _engine(url.set(database=str(draft)), "PRAGMA journal_mode = DELETE", *_DURABLE)
    try:
        try:
            with engine.begin() as connection:
                create(connection)
        finally:
            engine.dispose()
        _publish(draft, path)
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise unavailable(str(path), "created", error, f"check that {path.parent} has room") from error
    finally:
        draft.unlink(missing_ok=True)


def new_draft(path: Path) -> Path:
    """An empty file beside `path`, for its owner only, under a name of its own. Raises OSError."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return draft


def _publish(draft: Path, path: Path) -> None:
    """Give the draft its name, durably, unless the name is taken by now."""
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        draft.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _engine(url: URL, *pragmas: str, connections: int = 1) -> Engine:
    """Connections that run `pragmas` first. A single one is for writing, several are for reading."""
    engine = create_engine(
        url,
        hide_parameters=True,  # requests hold users' secrets, and errors are logged
        connect_args={"check_same_thread": False} | ({} if "timeout" in url.query else {"timeout": WAIT_S}),
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=WAIT_S,
    )

    @event.listens_for(engine, "connect")
    def _connected(connection: SqliteConnection, _: Any) -> None:
        try:
            # Python's driver would begin transactions at moments of its own choice.
            connection.isolation_level = None
            for pragma in pragmas:
                said = connection.execute(pragma).fetchone()
                if pragma == _WAL and said != ("wal",):
                    raise LedgerUnavailable(
                        f"the ledger {url.database} is on a file system without shared memory, which SQLite's "
                        "write-ahead log needs: move it to a local disk, or use PostgreSQL (RM_LEDGER_URL)"
                    )
        except BaseException:
            connection.close()
            raise

    if connections == 1:

        @event.listens_for(engine, "begin")
        def _begins(connection: Connection) -> None:
            # At once, so that waiting for another writer happens here and never in the middle.
            connection.connection.cursor().execute("BEGIN IMMEDIATE")

    return engine


def _require_intact(connection: Connection, name: str) -> None:
    """Reads the whole file once: better now than when a job's record turns out to be lost."""
    found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
        raise LedgerUnavailable(
            f"the ledger {name} is damaged ({found}): restore it from a backup (`rmctl ledger restore`), or "
            "save what is left with `sqlite3 … .dump` (docs/reliability.md)"
        )
