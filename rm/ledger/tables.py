"""The tables as this version writes and reads them. `migrations/` brings any older database to this shape.

GPU amounts are integers in GPU units (`rm.core.resources.GPU_UNIT`), times are seconds since the epoch, and the
JSON columns are text because `rm.ledger.codec` writes what the databases' own JSON types refuse (NaN, NUL).
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, Integer, MetaData, Table, Text

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

BigSerial = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only where the type is called INTEGER."""

meta = Table(
    "meta",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("submitted_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("key", Text, nullable=False, unique=True),
    Column("record", Text, nullable=False),
    Column("spec", Text, nullable=False),
    Column("array", Text),
    # Every listing is in the order of submission: `seq` ends each index, so that no query sorts.
    Index("ix_jobs_status", "status", "seq"),
    Index("ix_jobs_owner", "owner", "seq"),
    Index("ix_jobs_name", "name", "seq"),
    Index("ix_jobs_array", "array", "seq"),
)

usage = Table(
    "usage",
    metadata,
    Column("queue", Text, primary_key=True),
    Column("owner", Text, primary_key=True),
    Column("average", Double, nullable=False),
    Column("at", Double, nullable=False),
)
"""GPU units that an owner held in a queue, averaged over time, as of `at`."""

cordons = Table(
    "cordons",
    metadata,
    Column("node_id", Text, primary_key=True),
    Column("record", Text, nullable=False),
)
"""Nodes that get nothing new, by Ray's id of them."""

events = Table(
    "events",
    metadata,
    Column("seq", BigSerial, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("job_id", Text),
    Column("attempt", BigInteger),
    Column("body", Text, nullable=False),
    Column("free_before", BigInteger, nullable=False),
    Column("free_after", BigInteger, nullable=False),
    Column("charged_before", BigInteger, nullable=False),
    Column("charged_after", BigInteger, nullable=False),
    Index("ix_events_job_id", "job_id", "seq"),
    sqlite_autoincrement=True,
)
