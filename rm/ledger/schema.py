"""Which shape a database has, and how it gets the one that this version needs. Used while a ledger is opened.

Everything here runs inside the caller's transaction: a database is upgraded completely or not at all.
"""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, select

from rm.errors import LedgerUnavailable
from rm.ledger.tables import meta

APPLICATION = "ray-rm"
MIGRATIONS = Path(__file__).parent / "migrations"
_ALEMBIC = threading.Lock()
"""Alembic's `context` is one per process."""


def is_empty(connection: Connection) -> bool:
    """Whether the database, or the schema that the connection works in, has no table at all."""
    return not inspect(connection).get_table_names()


def create(connection: Connection) -> None:
    """Make an empty database a ledger, with a key drawn for good."""
    _run_revisions(connection)
    rows = {"application": APPLICATION, "key": secrets.token_hex(3)}
    connection.execute(meta.insert(), [{"name": name, "value": value} for name, value in rows.items()])


def upgrade(connection: Connection, name: str) -> None:
    """Bring a ledger to this version's shape.

    Raises LedgerUnavailable for a database that is not ours and for one that a newer version has written.
    """
    if revision(connection, name) != head():
        _run_revisions(connection)


def revision(connection: Connection, name: str) -> str:
    """The revision that the ledger has: this version's or an older one's.

    Raises LedgerUnavailable for a database that is not ours and for one that a newer version has written.
    """
    tables = set(inspect(connection).get_table_names())
    if not _is_ours(connection, tables):
        found = f"it holds {', '.join(sorted(tables)[:5])}" if tables else "it holds no table"
        raise LedgerUnavailable(
            f"the database {name} is no ledger of ray-rm ({found}): give RM_LEDGER_URL a database, or a "
            "PostgreSQL schema, of its own"
        )
    script = ScriptDirectory.from_config(_config())
    current = set(MigrationContext.configure(connection).get_current_heads())
    unknown = current - {each.revision for each in script.walk_revisions()}
    if unknown or len(current) != 1:
        raise LedgerUnavailable(
            f"the ledger {name} was written by a newer version of ray-rm (schema {', '.join(unknown) or 'none'}, "
            f"this one knows {script.get_current_head()}): upgrade ray-rm on this machine"
        )
    return current.pop()


def head() -> str:
    """The revision that this version writes."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def read_key(connection: Connection) -> str:
    """The ledger's own 6 hex characters: what tells its placement groups and processes from another's."""
    key = _meta(connection, "key")
    if key is None:
        raise LedgerUnavailable("the ledger has lost its key (table meta): restore it from a backup")
    return key


def _run_revisions(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    with _ALEMBIC:
        command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def _is_ours(connection: Connection, tables: set[str]) -> bool:
    if not {"meta", "alembic_version"} <= tables:
        return False
    columns = {each["name"] for each in inspect(connection).get_columns("meta")}
    return columns == {"name", "value"} and _meta(connection, "application") == APPLICATION


def _meta(connection: Connection, name: str) -> str | None:
    return connection.execute(select(meta.c.value).where(meta.c.name == name)).scalar_one_or_none()
