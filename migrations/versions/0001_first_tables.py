"""Projects, keys, files, jobs with their events, metrics and checkpoints, and models."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JSON_VALUE = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    _create_projects()
    _create_files()
    _create_jobs()
    _create_models()
    if op.get_bind().dialect.supports_alter:  # SQLite, which can't add it later, was given it with the table
        op.create_foreign_key(op.f("fk_fine_tuning_jobs_parent_model_models"), "fine_tuning_jobs", "models", ["parent_model"], ["id"])
    _create_events_and_metrics()
    _create_checkpoints()


def downgrade() -> None:
    for table in ("checkpoints", "job_metrics", "job_events"):
        op.drop_table(table)
    if op.get_bind().dialect.supports_alter:
        op.drop_constraint(op.f("fk_fine_tuning_jobs_parent_model_models"), "fine_tuning_jobs", type_="foreignkey")
    for table in ("models", "fine_tuning_jobs", "files", "api_keys", "projects"):
        op.drop_table(table)


def _create_projects() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        sa.UniqueConstraint("name", name=op.f("uq_projects_name")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("key_sha256", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.Column("last_used_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_api_keys_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    op.create_index(op.f("ix_api_keys_project_id"), "api_keys", ["project_id"])


def _create_files() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("storage_key", sa.String(), nullable=False),
        sa.Column("example_count", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_files_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_index(op.f("ix_files_project_id"), "files", ["project_id"])
    op.create_index(op.f("ix_files_purpose"), "files", ["purpose"])


def _create_jobs() -> None:
    op.create_table(
        "fine_tuning_jobs",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("parent_model", sa.String(), nullable=True),
        sa.Column("training_file_id", sa.String(), nullable=False),
        sa.Column("validation_file_id", sa.String(), nullable=True),
        sa.Column("method", JSON_VALUE, nullable=False),
        sa.Column("resolved_hyperparameters", JSON_VALUE, nullable=True),
        sa.Column("suffix", sa.String(), nullable=True),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("metadata", JSON_VALUE, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("estimated_finish_at", sa.Double(), nullable=True),
        sa.Column("lease_token", sa.String(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lost_leases", sa.Integer(), nullable=False),
        sa.Column("stop_requested", sa.String(), nullable=True),
        sa.Column("step", sa.Integer(), nullable=True),
        sa.Column("total_steps", sa.Integer(), nullable=True),
        sa.Column("phase", sa.String(), nullable=True),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=True),
        sa.Column("fine_tuned_model", sa.String(), nullable=True),
        sa.Column("result_file_id", sa.String(), nullable=True),
        sa.Column("error", JSON_VALUE, nullable=True),
        sa.CheckConstraint(
            "status in ('validating_files', 'queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_fine_tuning_jobs_status")
        ),
        sa.CheckConstraint("(lease_token is null) = (lease_until is null)", name=op.f("ck_fine_tuning_jobs_lease")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_fine_tuning_jobs_project_id_projects")),
        sa.ForeignKeyConstraint(["parent_model"], ["models.id"], name=op.f("fk_fine_tuning_jobs_parent_model_models"), use_alter=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fine_tuning_jobs")),
    )
    op.create_index(op.f("ix_fine_tuning_jobs_project_id"), "fine_tuning_jobs", ["project_id"])
    op.create_index("ix_fine_tuning_jobs_status_created_at", "fine_tuning_jobs", ["status", "created_at"])


def _create_models() -> None:
    op.create_table(
        "models",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("parent_model", sa.String(), nullable=True),
        sa.Column("step", sa.Integer(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("serving_name", sa.String(), nullable=False),
        sa.Column("storage_key", sa.String(), nullable=False),
        sa.Column("archive_bytes", sa.BigInteger(), nullable=False),
        sa.Column("archive_sha256", sa.String(), nullable=False),
        sa.Column("attestation", JSON_VALUE, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("status in ('servable', 'unverified', 'deleted')", name=op.f("ck_models_status")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_models_project_id_projects")),
        sa.ForeignKeyConstraint(["job_id"], ["fine_tuning_jobs.id"], name=op.f("fk_models_job_id_fine_tuning_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
        sa.UniqueConstraint("serving_name", name=op.f("uq_models_serving_name")),
    )
    op.create_index(op.f("ix_models_project_id"), "models", ["project_id"])
    op.create_index(op.f("ix_models_job_id"), "models", ["job_id"])


def _create_events_and_metrics() -> None:
    op.create_table(
        "job_events",
        sa.Column("sequence", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", JSON_VALUE, nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["fine_tuning_jobs.id"], name=op.f("fk_job_events_job_id_fine_tuning_jobs")),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_job_events")),
        sa.UniqueConstraint("id", name=op.f("uq_job_events_id")),
    )
    op.create_index(op.f("ix_job_events_job_id"), "job_events", ["job_id"])
    op.create_table(
        "job_metrics",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("metrics", JSON_VALUE, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["fine_tuning_jobs.id"], name=op.f("fk_job_metrics_job_id_fine_tuning_jobs")),
        sa.PrimaryKeyConstraint("job_id", "step", name=op.f("pk_job_metrics")),
    )


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("storage_key", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("metrics", JSON_VALUE, nullable=False),
        sa.Column("model_id", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["fine_tuning_jobs.id"], name=op.f("fk_checkpoints_job_id_fine_tuning_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("job_id", "step", name=op.f("uq_checkpoints_job_id_step")),
    )
    op.create_index(op.f("ix_checkpoints_job_id"), "checkpoints", ["job_id"])
