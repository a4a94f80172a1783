"""Workers that are there: each says so every few seconds. Nothing but forecasts and readiness depends on it; leases do not."""

from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from core.tables.base import Table


class Worker(Table):
    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    """Of one process, not of a machine."""
    host: Mapped[str]
    slots: Mapped[int]
    """Jobs that it trains at a time."""
    devices: Mapped[list[Any]]
    """The names of each slot's devices."""
    started_at: Mapped[float]
    seen_at: Mapped[float]
    """On the database's clock."""
