"""Data sets as a resource, answers to requests that may be repeated, and metadata of jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the tables and the column; earlier jobs have no metadata, and no data set outlived its job."""
    op.create_table(
        "datasets",
        sa.Column("tenant", sa.String, nullable=False, server_default="default"),
        sa.Column("id", sa.String, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.Column("upload", sa.String, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("dataset", sa.JSON, nullable=False),
        sa.Column("report", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "id", name="pk_datasets"),
    )
    op.create_table(
        "answers",
        sa.Column("tenant", sa.String, nullable=False, server_default="default"),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("request", sa.String, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("location", sa.String),
        sa.PrimaryKeyConstraint("tenant", "key", name="pk_answers"),
    )
    op.create_index("ix_answers_created_at", "answers", ["created_at"])
    op.add_column("jobs", sa.Column("metadata", sa.JSON(none_as_null=True)))
