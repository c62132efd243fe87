"""Revisions of the ledger's schema, in order. `rm.ledger.schema` runs them; nobody calls alembic by hand."""
