"""Uploaded files and result files. The bytes are in storage; a row exists only once they are complete there."""

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from core.tables.base import Table


class File(Table):
    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    filename: Mapped[str]
    purpose: Mapped[str] = mapped_column(index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    storage_key: Mapped[str] = mapped_column(index=True)
    example_count: Mapped[int | None]
    """Usable lines of a fine-tune file."""
    created_at: Mapped[float]
    expires_at: Mapped[float | None] = mapped_column(index=True)
