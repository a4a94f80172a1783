"""Servable names. Every trained version is immutable: its own row, its own archive, its own serving name."""

from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from core.tables.base import Table, index_of_some

MODEL_STATUSES = ("servable", "unverified", "deleted")


class Model(Table):
    """`status`: servable once the inference server's log-probabilities matched the trainer's; unverified before or where
    they did not; deleted keeps the lineage of the models trained from it."""

    __tablename__ = "models"
    __table_args__ = (
        CheckConstraint(f"status in {MODEL_STATUSES}", name="status"),
        index_of_some("ix_models_unverified", "created_at", "status = 'unverified'"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"), index=True)
    base_model: Mapped[str]
    parent_model: Mapped[str | None]
    """The `ft:` model this one was trained from, if any."""
    step: Mapped[int | None]
    """Set for checkpoints."""
    status: Mapped[str]
    serving_name: Mapped[str] = mapped_column(unique=True)
    """The only name that the inference server sees."""
    storage_key: Mapped[str] = mapped_column(index=True)
    """A tar.gz of the PEFT adapter."""
    archive_bytes: Mapped[int] = mapped_column(BigInteger)
    archive_sha256: Mapped[str]
    attestation: Mapped[dict[str, Any] | None]
    verify_after: Mapped[float | None]
    """An unverified one is not verified by any worker before (database clock); null: at once."""
    verification_attempts: Mapped[int] = mapped_column(server_default="0")
    """How often a worker began to verify it, since the last verdict."""
    created_at: Mapped[float]
