"""Deliveries of webhook events: claimed by a worker, sent, and settled.

pending ──claim──► being sent ──record_delivered──► delivered
   ▲                  │ record_failure
   └──────────────────┴─────────────► failed   (after a day, or because the endpoint was disabled)

A claim is a lease with a token, as a job's is (core.jobs.leases): while it holds, nobody else sends this delivery nor another
one to the same endpoint. A worker that dies leaves a lease that runs out, and the delivery is sent again: receivers tell
by the `webhook-id` what they have had already.
"""

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, case, delete, exists, func, null, or_, select, update
from sqlalchemy.orm import Session, aliased

from core.database import database_now, unix_now
from core.ids import new_token
from core.tables.webhooks import WebhookDelivery, WebhookEndpoint

GIVE_UP_SECONDS = 24 * 3600.0
RETRY_SECONDS = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0)
"""After the first attempt, the second, …; the last one again and again."""

KEEP_SECONDS = 30 * 86_400.0
"""How long it is kept what became of a delivery."""

DUE = and_(WebhookDelivery.next_attempt_at <= database_now(), or_(WebhookDelivery.lease_until.is_(None), WebhookDelivery.lease_until < database_now()))
_OVER: dict[str, Any] = {"next_attempt_at": None, "lease_token": None, "lease_until": None}


@dataclass(frozen=True)
class DeliveryClaim:
    """All that sending takes. `attempt` counts from 1."""

    delivery_id: str
    endpoint_id: str
    lease_token: str
    attempt: int
    event_type: str
    body: str
    url: str
    secrets: tuple[str, ...] = field(repr=False)


def delivery_is_due(session: Session) -> bool:
    """Whether `claim_delivery` might find any; only reads, so that looking often costs no write lock."""
    return session.scalar(select(WebhookDelivery.id).where(DUE).limit(1)) is not None


def claim_delivery(session: Session, lease_seconds: float) -> DeliveryClaim | None:
    """Hold a delivery that is due, of an endpoint to which nothing is being sent: a slow one delays its own alone. Of the project to which
    the fewest are being sent, so that many slow endpoints delay their own project's alone; among those the one that is due for longest.

    The endpoint is locked, and whether it is busy asked again once it is: another claim may have been committed since the first look.
    What nobody settled after its last claim waits behind the others then, and fails after its day as any other.
    """
    _fail_those_out_of_time(session)
    sending = aliased(WebhookDelivery)
    busy = exists().where(sending.endpoint_id == WebhookDelivery.endpoint_id, sending.lease_until > database_now())
    theirs = aliased(WebhookEndpoint)
    being_sent = (
        select(theirs.project_id, func.count().label("number"))
        .join(sending, sending.endpoint_id == theirs.id)
        .where(sending.lease_until > database_now())
        .group_by(theirs.project_id)
        .subquery()
    )
    first = (
        select(WebhookDelivery.id)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .outerjoin(being_sent, being_sent.c.project_id == WebhookEndpoint.project_id)
        .where(DUE, ~busy)
        .order_by(func.coalesce(being_sent.c.number, 0), WebhookDelivery.next_attempt_at)
        .limit(1)
        .with_for_update(of=(WebhookDelivery, WebhookEndpoint), skip_locked=True)
    )
    found = session.scalar(first)
    if found is None:
        return None
    token, until = new_token(), database_now() + lease_seconds
    claimed = session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.id == found, DUE, ~busy)
        .values(lease_token=token, lease_until=until, next_attempt_at=until, attempts=WebhookDelivery.attempts + 1)
        .returning(WebhookDelivery.endpoint_id, WebhookDelivery.attempts, WebhookDelivery.event_type, WebhookDelivery.body)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if claimed is None:
        return None
    endpoint = session.get_one(WebhookEndpoint, claimed.endpoint_id)
    secrets = signing_secrets(session, endpoint)
    return DeliveryClaim(found, endpoint.id, token, claimed.attempts, claimed.event_type, claimed.body, endpoint.url, secrets)


def _fail_those_out_of_time(session: Session) -> None:
    """Of which an attempt was made: what no worker was there for in time is sent all the same."""
    session.execute(
        update(WebhookDelivery)
        .where(DUE, WebhookDelivery.attempts > 0, WebhookDelivery.give_up_at < database_now())
        .values(failed_at=unix_now(), last_error=func.coalesce(WebhookDelivery.last_error, "no worker brought an attempt to its end"), **_OVER)
        .execution_options(synchronize_session=False)
    )


def delete_old_deliveries(session: Session, limit: int) -> int:
    """Of those that were over long ago, at most `limit`. Returns how many."""
    old = select(WebhookDelivery.id).where(WebhookDelivery.created_at < unix_now() - KEEP_SECONDS, WebhookDelivery.next_attempt_at.is_(None)).limit(limit)
    deleted = delete(WebhookDelivery).where(WebhookDelivery.id.in_(old)).returning(WebhookDelivery.id)
    return len(session.scalars(deleted.execution_options(synchronize_session=False)).all())


def signing_secrets(session: Session, endpoint: WebhookEndpoint) -> tuple[str, ...]:
    """The endpoint's secret, and the one before it while that is still valid."""
    now: float = session.execute(select(database_now())).scalar_one()
    if endpoint.previous_secret is None or (endpoint.previous_secret_until or 0) <= now:
        return (endpoint.secret,)
    return (endpoint.secret, endpoint.previous_secret)


def record_delivered(session: Session, claim: DeliveryClaim, status: int) -> bool:
    """The endpoint answered 2xx. Returns False where the delivery is no longer held under this claim."""
    return _change_held(session, claim, delivered_at=unix_now(), last_status=status, last_error=None, **_OVER) is not None


def record_failure(session: Session, claim: DeliveryClaim, reason: str, status: int | None) -> float | None:
    """Try again later, or give up. Returns in how many seconds (about), None where there is no further attempt."""
    delay = RETRY_SECONDS[min(claim.attempt, len(RETRY_SECONDS)) - 1]
    again = database_now() + delay <= WebhookDelivery.give_up_at
    kept = _change_held(
        session,
        claim,
        last_status=status,
        last_error=reason,
        lease_token=None,
        lease_until=None,
        next_attempt_at=case((again, database_now() + delay), else_=null()),
        failed_at=case((again, null()), else_=unix_now()),
    )
    return delay if kept is not None and kept.next_attempt_at is not None else None


def record_gone(session: Session, claim: DeliveryClaim, reason: str, status: int) -> None:
    """The endpoint asked for no more: it is disabled, unless its owner gave it another URL meanwhile."""
    same_url = select(WebhookEndpoint.id).where(WebhookEndpoint.id == claim.endpoint_id, WebhookEndpoint.url == claim.url)
    if session.scalar(same_url.with_for_update(key_share=True)) is None:
        record_failure(session, claim, reason, status)
    else:
        _change_held(session, claim, last_status=status)
        disable_endpoint(session, claim.endpoint_id, reason)


def disable_endpoint(session: Session, endpoint_id: str, reason: str) -> None:
    """Nothing more is sent there until its owner enables it again; what waits for it has failed. The endpoint first: its row is the
    lock against new deliveries."""
    now = unix_now()
    session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.disabled_at.is_(None))
        .values(disabled_at=now, disabled_reason=reason, updated_at=now)
        .execution_options(synchronize_session=False)
    )
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.next_attempt_at.is_not(None))
        .values(failed_at=now, last_error=reason, **_OVER)
        .execution_options(synchronize_session=False)
    )


def _change_held(session: Session, claim: DeliveryClaim, **columns: Any) -> Any:
    return session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.id == claim.delivery_id, WebhookDelivery.lease_token == claim.lease_token)
        .values(**columns)
        .returning(WebhookDelivery.id, WebhookDelivery.next_attempt_at)
        .execution_options(synchronize_session=False)
    ).one_or_none()
