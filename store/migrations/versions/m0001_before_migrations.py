"""The tables of the releases that had no migrations, whichever of them are missing.

A store of such a release is adopted by this: it has these tables already, and perhaps not all of their columns.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

INDEXES = {"ix_jobs_status": ("jobs", "status"), "ix_versions_job_id": ("versions", "job_id")}


def upgrade() -> None:
    """Create missing tables, then missing columns, then missing indexes."""
    inspector = sa.inspect(op.get_bind())
    present = set(inspector.get_table_names())
    for table, columns in _tables().items():
        if table not in present:
            op.create_table(table, *columns)
            continue
        names = {column["name"] for column in inspector.get_columns(table)}
        for column in columns:
            if column.name not in names:
                op.add_column(table, column)
    for name, (table, column_name) in INDEXES.items():
        op.create_index(name, table, [column_name], if_not_exists=True)


def _tables() -> dict[str, list[sa.Column[Any]]]:
    return {
        "models": [
            sa.Column("name", sa.String, primary_key=True),
            sa.Column("last_version", sa.Integer, nullable=False),
            sa.Column("created_at", sa.Float, nullable=False),
        ],
        "versions": [
            sa.Column("model", sa.String, primary_key=True),
            sa.Column("version", sa.Integer, primary_key=True),
            sa.Column("live", sa.Boolean, nullable=False),
            sa.Column("removed", sa.Boolean, nullable=False, server_default=sa.false()),
            sa.Column("job_id", sa.String),
            sa.Column("created_at", sa.Float, nullable=False),
            sa.Column("manifest", sa.JSON, nullable=False),
            sa.Column("report", sa.JSON, nullable=False),
        ],
        "labels": [
            sa.Column("model", sa.String, primary_key=True),
            sa.Column("label", sa.String, primary_key=True),
            sa.Column("version", sa.Integer, nullable=False),
            sa.Column("weight", sa.Float, nullable=False, server_default="0"),
        ],
        "revisions": [
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("revision", sa.Integer),
        ],
        "jobs": [
            sa.Column("id", sa.String, primary_key=True),
            sa.Column("model", sa.String, nullable=False),
            sa.Column("version", sa.Integer),
            sa.Column("label", sa.String, nullable=False, server_default="stable"),
            sa.Column("base", sa.String, nullable=False),
            sa.Column("status", sa.String, nullable=False),
            sa.Column("stage", sa.String),
            sa.Column("progress", sa.JSON, nullable=False),
            sa.Column("created_at", sa.Float, nullable=False),
            sa.Column("started_at", sa.Float),
            sa.Column("finished_at", sa.Float),
            sa.Column("spec", sa.JSON, nullable=False),
            sa.Column("dataset", sa.JSON, nullable=False),
            sa.Column("error", sa.JSON(none_as_null=True)),
            sa.Column("report_status", sa.String, nullable=False),
            sa.Column("worker", sa.String),
            sa.Column("attempts", sa.Integer, nullable=False),
            sa.Column("cancel_requested", sa.Boolean, nullable=False),
        ],
        "workers": [
            sa.Column("id", sa.String, primary_key=True),
            sa.Column("state", sa.String, nullable=False),
            sa.Column("seen_at", sa.Float, nullable=False),
        ],
    }
