"""Leases of jobs as numbers that only grow, and clients' requests to pause a running job."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns; a job that runs meanwhile keeps its worker under the number 0."""
    op.add_column("jobs", sa.Column("lease", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("pause_requested", sa.Boolean, nullable=False, server_default=sa.false()))
