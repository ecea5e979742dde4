"""Tenants take turns at the workers."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the table; tenants that are not in it have had no turn."""
    op.create_table(
        "turns",
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("claimed_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("tenant", name="pk_turns"),
    )
