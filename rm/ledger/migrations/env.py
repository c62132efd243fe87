"""Alembic's entry: runs the revisions on the connection, and in the transaction, that `rm.ledger.schema` holds."""

from __future__ import annotations

from alembic import context

from rm.ledger.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
