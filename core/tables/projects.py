"""Projects own everything; API keys open one project, for what their scopes allow."""

from typing import Any, Literal, get_args

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from core.tables.base import Table

Scope = Literal["read", "write", "infer", "admin"]
"""What a key may do: read its project's objects; make, change and delete them; have models answer; and, beyond its own
project, manage all projects and keys of the server."""
SCOPES: tuple[Scope, ...] = get_args(Scope)


class Project(Table):
    __tablename__ = "projects"
    __table_args__ = (CheckConstraint("max_running_jobs >= 1", name="max_running_jobs"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    """Appears in the names of the project's models."""
    created_at: Mapped[float]
    archived_at: Mapped[float | None]
    """From then on its keys open nothing."""
    max_running_jobs: Mapped[int | None]
    """How many of its jobs may train at a time; null: as the server's settings say."""
    last_claimed_at: Mapped[float | None]
    """When training of one of its jobs was last begun or resumed (database clock): projects take turns."""


class ApiKey(Table):
    """`id` is the public part of the key; of the secret only the SHA-256 of the whole key is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    key_sha256: Mapped[str]
    scopes: Mapped[list[Any]]
    """Some of SCOPES."""
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]
