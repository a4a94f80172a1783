"""Fine-tuning jobs with their events, metrics and checkpoints. Changed only through core.jobs."""

from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from core.tables.base import Table, index_of_some

JOB_STATUSES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")
TERMINAL_STATUSES = ("succeeded", "failed", "cancelled")
UNFINISHED_STATUSES = tuple(status for status in JOB_STATUSES if status not in TERMINAL_STATUSES)
"""What queries look for: an index finds these, and no index what is none of the others."""


class Job(Table):
    """A job is held by whoever knows its `lease_token` until `lease_until` (database clock).

    `attempt` counts how often training was started; `lost_leases` how often it was lost through a crash since its
    newest checkpoint, which is limited.
    """

    __tablename__ = "fine_tuning_jobs"
    __table_args__ = (
        CheckConstraint(f"status in {JOB_STATUSES}", name="status"),
        CheckConstraint("(lease_token is null) = (lease_until is null)", name="lease"),
        Index("ix_fine_tuning_jobs_status_created_at", "status", "created_at"),
        Index("ix_fine_tuning_jobs_status_finished_at", "status", "finished_at"),
        index_of_some("ix_fine_tuning_jobs_lease_until", "lease_until", "lease_until is not null"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    status: Mapped[str]
    model: Mapped[str]
    """As the user named it: a base model, or a tuned model to continue from."""
    base_model: Mapped[str]
    parent_model: Mapped[str | None] = mapped_column(ForeignKey("models.id", use_alter=True), index=True)
    training_file_id: Mapped[str]
    validation_file_id: Mapped[str | None]
    method: Mapped[dict[str, Any]]
    """The method object, defaults filled in, "auto" where the user left it."""
    resolved_hyperparameters: Mapped[dict[str, Any] | None]
    """Numbers in place of every "auto", once the files are validated."""
    suffix: Mapped[str | None]
    seed: Mapped[int]
    job_metadata: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    origin: Mapped[dict[str, Any] | None]
    """The request that created it: `request_id`, and `trace_parent` (W3C Trace Context) where requests are traced."""

    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    estimated_finish_at: Mapped[float | None]

    lease_token: Mapped[str | None]
    lease_until: Mapped[float | None]
    attempt: Mapped[int] = mapped_column(default=0)
    lost_leases: Mapped[int] = mapped_column(default=0)
    stop_requested: Mapped[str | None]
    """cancel, pause, or null: what the holder of the job is asked for."""

    step: Mapped[int | None]
    total_steps: Mapped[int | None]
    phase: Mapped[str | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    fine_tuned_model: Mapped[str | None]
    result_file_id: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]


class JobEvent(Table):
    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job_id_sequence", "job_id", "sequence"),)

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    """Order of events; what pages and streams go by."""
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"))
    created_at: Mapped[float]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]


class JobMetrics(Table):
    """One row a step; a step replayed after a resume replaces its row."""

    __tablename__ = "job_metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    created_at: Mapped[float]
    metrics: Mapped[dict[str, Any]]


class Checkpoint(Table):
    """A complete training state in storage (a tar), from which any machine can resume; later only the record that there was one."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"), index=True)
    step: Mapped[int]
    created_at: Mapped[float]
    storage_key: Mapped[str | None] = mapped_column(index=True)
    """Null once the state was superseded by newer ones, or its job has ended."""
    sha256: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    model_id: Mapped[str | None]
    """The servable model of this checkpoint."""
