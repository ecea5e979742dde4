"""Webhooks with their deliveries, and the priorities of jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the tables and the column; jobs of earlier releases have the usual priority."""
    op.add_column("jobs", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("tenant", sa.String, nullable=False, server_default="default"),
        sa.Column("url", sa.String, nullable=False),
        sa.Column("types", sa.JSON(none_as_null=True)),
        sa.Column("secret", sa.String, nullable=False),
        sa.Column("old_secret", sa.String),
        sa.Column("old_secret_until", sa.Float),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("disabled_at", sa.Float),
        sa.Column("disabled_because", sa.String),
        sa.PrimaryKeyConstraint("id", name="pk_webhooks"),
    )
    op.create_index("ix_webhooks_tenant", "webhooks", ["tenant"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("tenant", sa.String, nullable=False, server_default="default"),
        sa.Column("webhook", sa.String, nullable=False),
        sa.Column("type", sa.String, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("due_at", sa.Float),
        sa.Column("lease", sa.String),
        sa.Column("attempted_at", sa.Float),
        sa.Column("http_status", sa.Integer),
        sa.Column("error", sa.String),
        sa.PrimaryKeyConstraint("id", name="pk_deliveries"),
        sa.ForeignKeyConstraint(
            ["webhook"], ["webhooks.id"], name="fk_deliveries_webhook_webhooks", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_deliveries_webhook", "deliveries", ["webhook"])
    op.create_index("ix_deliveries_due_at", "deliveries", ["due_at"])
