"""Other forms of a model's weights, made when somebody first asks for them."""

from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from core.tables.base import Table

EXPORT_FORMATS = ("merged", "gguf")
EXPORT_STATUSES = ("pending", "running", "ready", "failed")


class ModelExport(Table):
    """One form of one model. What each status means, and how one becomes another, stands in core.model_exports."""

    __tablename__ = "model_exports"
    __table_args__ = (
        CheckConstraint(f"format in {EXPORT_FORMATS}", name="format"),
        CheckConstraint(f"status in {EXPORT_STATUSES}", name="status"),
    )

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    format: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(index=True)
    attempts: Mapped[int]
    """How often a worker began to make it."""
    lease_token: Mapped[str | None]
    lease_until: Mapped[float | None]
    storage_key: Mapped[str | None] = mapped_column(index=True)
    """A tar.gz, once it is ready."""
    archive_bytes: Mapped[int | None] = mapped_column(BigInteger)
    archive_sha256: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    """Why it failed: code and message."""
    created_at: Mapped[float]
    updated_at: Mapped[float]
