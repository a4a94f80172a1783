"""Merged and GGUF forms of models, made on demand."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

JSON_VALUE = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "model_exports",
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_token", sa.String(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("storage_key", sa.String(), nullable=True),
        sa.Column("archive_bytes", sa.BigInteger(), nullable=True),
        sa.Column("archive_sha256", sa.String(), nullable=True),
        sa.Column("error", JSON_VALUE, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.CheckConstraint("format in ('merged', 'gguf')", name=op.f("ck_model_exports_format")),
        sa.CheckConstraint("status in ('pending', 'running', 'ready', 'failed')", name=op.f("ck_model_exports_status")),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_model_exports_model_id_models")),
        sa.PrimaryKeyConstraint("model_id", "format", name=op.f("pk_model_exports")),
    )


def downgrade() -> None:
    op.drop_table("model_exports")
