"""API keys, and the tenant that a job belongs to. What there was before belongs to the tenant `default`."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Make the table and add the column."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("tenant", sa.String, nullable=False, server_default="default"),
        sa.Column("scopes", sa.String, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("revoked_at", sa.Float),
        sa.Column("rate", sa.Float),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("sha256", name="uq_api_keys_sha256"),
    )
    op.add_column("jobs", sa.Column("tenant", sa.String, nullable=False, server_default="default"))
    op.create_index("ix_jobs_tenant", "jobs", ["tenant"])
