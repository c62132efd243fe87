"""What queues need: owners' usage over time, and which jobs were submitted together as an array."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("average", sa.Double, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("queue", "owner", name="pk_usage"),
    )
    op.add_column("jobs", sa.Column("array", sa.Text))
    op.create_index("ix_jobs_array", "jobs", ["array", "seq"])


def downgrade() -> None:
    """An older ledger is a backup of it."""
    raise NotImplementedError
