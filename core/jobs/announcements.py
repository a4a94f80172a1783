"""The end of a job as webhooks tell of it, written inside the transaction of the change: none is lost, and none is invented."""

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from core.database import database_now, unix_now
from core.ids import new_webhook_id
from core.tables.jobs import Job
from core.tables.webhooks import WebhookDelivery, WebhookEndpoint
from core.webhooks.deliveries import GIVE_UP_SECONDS
from core.webhooks.events import new_event_body


def announce(session: Session, job_id: str, event_type: str) -> None:
    """One delivery for each enabled endpoint of the job's project that asked for events of this type. The endpoints are locked:
    one that is deleted or disabled at this moment either gets no delivery or takes it away."""
    endpoints = session.execute(
        select(WebhookEndpoint.id, WebhookEndpoint.event_types)
        .join(Job, Job.project_id == WebhookEndpoint.project_id)
        .where(Job.id == job_id, WebhookEndpoint.disabled_at.is_(None))
        .with_for_update(read=True, of=WebhookEndpoint)
    ).all()
    body = new_event_body(event_type, job_id)
    for endpoint in endpoints:
        if event_type in endpoint.event_types:
            session.execute(
                insert(WebhookDelivery).values(
                    id=new_webhook_id("wh"),
                    endpoint_id=endpoint.id,
                    event_type=event_type,
                    body=body,
                    created_at=unix_now(),
                    next_attempt_at=database_now(),
                    give_up_at=database_now() + GIVE_UP_SECONDS,
                    attempts=0,
                )
            )
