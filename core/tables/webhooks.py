"""Webhook endpoints of projects, and what is to be delivered to them."""

from typing import Any

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from core.tables.base import Table, index_of_some


class WebhookEndpoint(Table):
    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[Any]]
    secret: Mapped[str]
    """As its owner was shown it: signatures need it in plain."""
    previous_secret: Mapped[str | None]
    """Signs too until `previous_secret_until` (database clock)."""
    previous_secret_until: Mapped[float | None]
    disabled_at: Mapped[float | None]
    disabled_reason: Mapped[str | None]
    created_at: Mapped[float]
    updated_at: Mapped[float]


class WebhookDelivery(Table):
    """One event for one endpoint. Due from `next_attempt_at`, which is null once it is over; held by a lease while it is being
    sent. All three on the database's clock. What changes it stands in core.webhooks.deliveries."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        index_of_some("ix_webhook_deliveries_failed_at", "failed_at", "failed_at is not null"),
        index_of_some("ix_webhook_deliveries_being_sent", "endpoint_id", "lease_until is not null"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    """The `webhook-id` header of every attempt."""
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"), index=True)
    event_type: Mapped[str]
    body: Mapped[str]
    created_at: Mapped[float] = mapped_column(index=True)
    next_attempt_at: Mapped[float | None] = mapped_column(index=True)
    give_up_at: Mapped[float]
    """No attempt is planned for later than this."""
    attempts: Mapped[int]
    lease_token: Mapped[str | None]
    lease_until: Mapped[float | None]
    delivered_at: Mapped[float | None]
    failed_at: Mapped[float | None]
    last_status: Mapped[int | None]
    last_error: Mapped[str | None]
