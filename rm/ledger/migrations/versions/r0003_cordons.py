"""Which nodes are cordoned, by whom and why."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "cordons",
        sa.Column("node_id", sa.Text, nullable=False),
        sa.Column("record", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("node_id", name="pk_cordons"),
    )


def downgrade() -> None:
    """An older ledger is a backup of it."""
    raise NotImplementedError
