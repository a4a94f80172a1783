"""Indexes for what polls, deletions and collections look for; and when each model is verified next, so that workers share them out."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

INDEXES: dict[str, dict[str, tuple[list[str], str | None]]] = {
    "webhook_deliveries": {
        "ix_webhook_deliveries_created_at": (["created_at"], None),
        "ix_webhook_deliveries_failed_at": (["failed_at"], "failed_at is not null"),
        "ix_webhook_deliveries_being_sent": (["endpoint_id"], "lease_until is not null"),
    },
    "model_exports": {
        "ix_model_exports_storage_key": (["storage_key"], None),
        "ix_model_exports_status": (["status"], None),
    },
    "files": {
        "ix_files_storage_key": (["storage_key"], None),
        "ix_files_expires_at": (["expires_at"], None),
    },
    "checkpoints": {"ix_checkpoints_storage_key": (["storage_key"], None)},
    "fine_tuning_jobs": {
        "ix_fine_tuning_jobs_lease_until": (["lease_until"], "lease_until is not null"),
        "ix_fine_tuning_jobs_parent_model": (["parent_model"], None),
        "ix_fine_tuning_jobs_status_finished_at": (["status", "finished_at"], None),
    },
    "models": {
        "ix_models_storage_key": (["storage_key"], None),
        "ix_models_unverified": (["created_at"], "status = 'unverified'"),
    },
}
"""By table and name: the columns, and of which rows. Processes of the version before still run, and a table is locked until the end: those
that hold up the least come first, and jobs before models, as a worker that publishes locks them."""


def upgrade() -> None:
    for table, indexes in INDEXES.items():
        for name, (columns, rows) in indexes.items():
            where = None if rows is None else sa.text(rows)
            op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)
    op.add_column("models", sa.Column("verify_after", sa.Double(), nullable=True))
    op.add_column("models", sa.Column("verification_attempts", sa.Integer(), server_default="0", nullable=False))


def downgrade() -> None:
    for table, indexes in INDEXES.items():
        for name in indexes:
            op.drop_index(name, table)
    op.drop_column("models", "verification_attempts")
    op.drop_column("models", "verify_after")
