"""What an automatic search has chosen, and the version that a job publishes before it searches."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns; jobs of earlier releases were not searched."""
    op.add_column("jobs", sa.Column("resolved_spec", sa.JSON(none_as_null=True)))
    op.add_column("jobs", sa.Column("preview_version", sa.Integer))
