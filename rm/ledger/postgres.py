"""The ledger in a PostgreSQL database, or in a schema of one (`?options=-csearch_path%3Dname`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError

from rm.errors import LedgerUnavailable
from rm.ledger.database import READERS, WAIT_S, Database, unavailable
from rm.ledger.schema import create, is_empty, upgrade

FENCE_KEY = 0x7261792D726D
"""The advisory lock that each transaction holds until it has ended, however its connection fared ("ray-rm")."""

_SESSION = f"""
    SELECT set_config('lock_timeout', '{WAIT_S}s', false),
           set_config('idle_in_transaction_session_timeout', '30s', false),
           set_config('synchronous_commit',
                      CASE current_setting('synchronous_commit')
                      WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, false)
"""
"""A server set up for speed must not acknowledge what it would forget; a stricter one stays strict."""

_TCP = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
"""A server that vanished is noticed within seconds (tcp_user_timeout: milliseconds), not after the kernel's
quarter of an hour. What the URL says about these wins."""


def open_postgres(url: URL) -> Database:
    """The ledger at `url`, its tables made if the database has none at all. Raises LedgerUnavailable."""
    name = public_name(url)
    writer, reader = _engine(url, writes=True), _engine(url, writes=False)
    advice = "check that the server answers and that RM_LEDGER_URL is right; nothing was acknowledged"
    fence = text(f"SELECT pg_advisory_xact_lock({FENCE_KEY})")
    database = Database(name, advice, writer, reader, fence)
    try:
        with database.transaction("opened") as connection:
            encoding = connection.execute(text("SHOW server_encoding")).scalar()
            if encoding != "UTF8":
                raise LedgerUnavailable(
                    f"the ledger {name} is encoded as {encoding} and can't hold every text: create the database "
                    "with ENCODING 'UTF8'"
                )
            if is_empty(connection):
                create(connection)
            upgrade(connection, name)
    except BaseException:
        database.close()
        raise
    return database


@contextmanager
def snapshot(url: URL) -> Iterator[Connection]:
    """The ledger as it is at one moment, for reading only. Raises LedgerUnavailable."""
    name = public_name(url)
    engine = _engine(url, writes=False)
    try:
        with engine.connect() as connection:
            connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            yield connection
    except SQLAlchemyError as error:
        raise unavailable(
            name, "read", error, "check that the server answers and that the URL is right"
        ) from error
    finally:
        engine.dispose()


def public_name(url: URL) -> str:
    """The URL for messages: without options, driver and password."""
    return url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)


def _engine(url: URL, *, writes: bool) -> Engine:
    """Raises LedgerUnavailable for another driver than ours, and where ours is not installed."""
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername != "postgresql+psycopg":
        raise LedgerUnavailable(f"the ledger's URL asks for {url.drivername}: write it as postgresql://…")
    try:
        return _made(url, writes=writes)
    except ImportError as error:
        raise LedgerUnavailable(
            f"the ledger {public_name(url)} needs the PostgreSQL driver: pip install 'ray-rm[postgres]' ({error})"
        ) from error


def _made(url: URL, *, writes: bool) -> Engine:
    engine = create_engine(
        url,
        hide_parameters=True,  # requests hold users' secrets, and errors are logged
        connect_args={key: value for key, value in _TCP.items() if key not in url.query},
        isolation_level="READ COMMITTED" if writes else "AUTOCOMMIT",
        pool_size=1 if writes else READERS,
        max_overflow=0,
        pool_timeout=WAIT_S,
        pool_pre_ping=True,  # a restarted server costs a reconnection, not a failed commit
    )

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        before, connection.autocommit = connection.autocommit, True
        connection.execute(_SESSION)
        connection.autocommit = before

    return engine
