"""Who changed what: written in the transaction of the change, and never changed itself (triggers of the migration refuse it)."""

from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from core.tables.base import Table


class AuditEvent(Table):
    """Holds ids without foreign keys: it outlives what it names."""

    __tablename__ = "audit_events"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    action: Mapped[str]
    """One of core.audit.ACTIONS."""
    project_id: Mapped[str]
    """The project of the object, or that is the object."""
    object_id: Mapped[str]
    actor_key_id: Mapped[str | None]
    """The API key that asked for it; null where the server did it by itself."""
    request_id: Mapped[str | None]
    details: Mapped[dict[str, Any] | None]
