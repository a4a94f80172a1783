"""The request that created a job: its id, so that workers' log lines name it, and its trace, so that workers' spans belong to it."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

JSON_VALUE = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("fine_tuning_jobs", sa.Column("origin", JSON_VALUE, nullable=True))


def downgrade() -> None:
    op.drop_column("fine_tuning_jobs", "origin")
