"""The trace that a job belongs to, and an index by which the jobs that have just finished are found."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Add both; earlier jobs belong to no trace."""
    op.add_column("jobs", sa.Column("trace", sa.String))
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at"])
