"""Projects own everything; API keys open one project."""

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from core.tables.base import Table


class Project(Table):
    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    """Appears in the names of the project's models."""
    created_at: Mapped[float]
    last_claimed_at: Mapped[float | None]
    """When training of one of its jobs was last begun or resumed (database clock): projects take turns."""


class ApiKey(Table):
    """`id` is the public part of the key; of the secret only the SHA-256 of the whole key is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    key_sha256: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]
