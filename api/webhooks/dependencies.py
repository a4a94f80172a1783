from typing import Annotated

from fastapi import Depends
from sqlalchemy import select

from api.state import ProjectId, State
from core.errors import NotFound
from core.tables.webhooks import WebhookEndpoint
from sdft_engine.contract.quoting import quoted


def _owned_endpoint(webhook_endpoint_id: str, state: State, project_id: ProjectId) -> WebhookEndpoint:
    with state.database.reading() as session:
        endpoint = session.scalar(select(WebhookEndpoint).where(WebhookEndpoint.id == webhook_endpoint_id, WebhookEndpoint.project_id == project_id))
    if endpoint is None:
        raise no_such_endpoint(webhook_endpoint_id)
    return endpoint


def no_such_endpoint(webhook_endpoint_id: str) -> NotFound:
    return NotFound(f"there is no webhook endpoint {quoted(webhook_endpoint_id)}", param="webhook_endpoint_id")


OwnedEndpoint = Annotated[WebhookEndpoint, Depends(_owned_endpoint)]
"""The webhook endpoint of the path, of the caller's project; 404 otherwise."""
