"""One database: a single connection that writes, a few others that only read, and one error for all its ills.

What differs between SQLite and PostgreSQL stands in `sqlite.py` and `postgres.py`; both make a `Database`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import URL, Connection, Engine, TextClause, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from rm.errors import LedgerUnavailable

WAIT_S = 5.0
"""How long a transaction waits for somebody else's lock: another writer, a backup, a console."""
READERS = 4
"""Connections for reading: the most reads that go on at once."""


@dataclass(slots=True, eq=False)
class Database:
    """`writer` has one connection, used under a lock; `reader` others, so that reads never wait for a commit.

    `name` is how messages call it (never with a password), `advice` what to check when it fails.
    """

    name: str
    advice: str
    writer: Engine
    reader: Engine
    fence: TextClause | None = None
    """Run first in each transaction: waits until no other transaction of a ledger is still being committed."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    @contextmanager
    def transaction(self, doing: str = "written") -> Iterator[Connection]:
        """The one write transaction: committed at the end of the block, rolled back if it raises.

        It sees the outcome of every earlier transaction, also of one whose connection was lost while it was
        being committed. Raises LedgerUnavailable for whatever the database has against it.
        """
        with self._lock, self._translated(doing), self.writer.begin() as connection:
            if self.fence is not None:
                connection.execute(self.fence)
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for reading what is committed. Each statement sees one moment. Raises LedgerUnavailable."""
        with self._translated("read"), self.reader.connect() as connection:
            yield connection

    def close(self) -> None:
        """Close every connection. Later calls raise LedgerUnavailable. Closing twice is fine."""
        with self._lock:
            self._closed = True
            self.reader.dispose()
            self.writer.dispose()  # last: SQLite then folds its write-ahead log into the file

    @property
    def _driver_error(self) -> type[Exception]:
        """What the driver raises where it is called past SQLAlchemy."""
        driver: Any = self.writer.dialect.loaded_dbapi
        error: type[Exception] = driver.Error
        return error

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        if self._closed:
            raise LedgerUnavailable(f"the ledger {self.name} is closed")
        try:
            yield
        except (SQLAlchemyError, OverflowError, self._driver_error) as error:
            # OverflowError: a number beyond SQLite's 64 bits.
            raise unavailable(self.name, doing, error, self.advice) from error


def parse_url(url: str) -> URL:
    """A ledger's URL. Raises LedgerUnavailable for anything but SQLite and PostgreSQL."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    backend = parsed.drivername.split("+")[0] if parsed is not None else ""
    if parsed is None or backend not in ("sqlite", "postgresql", "postgres"):
        raise LedgerUnavailable(
            "the ledger's URL (RM_LEDGER_URL) must be sqlite:////path/to/ledger.sqlite or "
            f"postgresql://user@host/database, not {backend or 'something else'}"
        )
    return parsed


def unavailable(name: str, doing: str, error: Exception, advice: str) -> LedgerUnavailable:
    """The error for a database that failed: what could not be done, the database's own words, what to check."""
    # A DBAPIError's own text repeats statement and parameters, which are users' data.
    words = str(error.orig if isinstance(error, DBAPIError) else error).strip() or type(error).__name__
    return LedgerUnavailable(f"the ledger {name} can't be {doing}: {words}; {advice}")
