"""Conditions for a version to get its label: those of a model, and how a job's version met them."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the columns; earlier models have the default gate, and earlier versions were not judged."""
    op.add_column("models", sa.Column("gate", sa.JSON(none_as_null=True)))
    op.add_column("jobs", sa.Column("gate", sa.JSON(none_as_null=True)))
