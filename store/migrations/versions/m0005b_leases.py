"""A fencing token for whoever works on a job."""

import sqlalchemy as sa
from alembic import op

revision = "0005b"
down_revision = "0003"


def upgrade() -> None:
    """Add the column; no process of the earlier release runs any more, so its leases are worth nothing."""
    op.add_column("jobs", sa.Column("lease", sa.Integer, nullable=False, server_default="0"))
