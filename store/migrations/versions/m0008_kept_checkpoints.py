"""Jobs that publish a checkpoint of another job."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column; earlier jobs have trained what they published."""
    op.add_column("jobs", sa.Column("checkpoint", sa.JSON(none_as_null=True)))
