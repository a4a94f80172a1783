"""What a request created, so that the same request, sent again, creates nothing more."""

from sqlalchemy.orm import Mapped, mapped_column

from core.tables.base import Table


class IdempotencyRecord(Table):
    """Written in the transaction that creates the object; the primary key decides between two tries at the same time. What
    counts as the same request stands in api.idempotency."""

    __tablename__ = "idempotency_records"

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    """SHA-256 of what names the request."""
    request_sha256: Mapped[str]
    """SHA-256 of method, path and body."""
    object_id: Mapped[str] = mapped_column(index=True)
    by_retry: Mapped[bool]
    """Whether a later try created it, and not the first."""
    answer: Mapped[str | None]
    """The first answer's body, JSON, where the client named the request itself."""
    created_at: Mapped[float]
    expires_at: Mapped[float] = mapped_column(index=True)
    """When it stands for nothing any more and is deleted."""
