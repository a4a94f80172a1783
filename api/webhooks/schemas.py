"""Webhook endpoints on the wire, as the stock client has them."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from api.pagination import Identified
from api.strict_json import FIRST_ERROR_ENDS, WITHOUT_NUL, KnownFields
from core.tables.webhooks import WebhookEndpoint
from core.webhooks.addresses import MAX_URL_LENGTH
from core.webhooks.events import EVENT_TYPES
from core.webhooks.signing import hint_of

EventType = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
EventTypes = Annotated[list[EventType], FIRST_ERROR_ENDS, Field(min_length=1, max_length=len(EVENT_TYPES))]
Name = Annotated[str, Field(min_length=1, max_length=256), WITHOUT_NUL]
Url = Annotated[str, Field(max_length=MAX_URL_LENGTH), WITHOUT_NUL]


class CreateEndpoint(KnownFields):
    name: Name
    url: Url
    event_types: EventTypes


class UpdateEndpoint(KnownFields):
    """What is not given stays as it is."""

    name: Name | None = None
    url: Url | None = None
    event_types: EventTypes | None = None
    enabled: bool | None = None


class RotateSecret(KnownFields):
    keep_old_secret_active_for_24_hours: bool = False


class TestEndpoint(KnownFields):
    event_type: EventType


class EndpointObject(Identified):
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    enabled: bool
    disabled_reason: str | None


class EndpointWithSecret(EndpointObject):
    signing_secret: str


class DeletedEndpoint(Identified):
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool


class TestResult(BaseModel):
    """The endpoint answered: with what, `status_code` says."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class EventTypeList(BaseModel):
    object: Literal["list"] = "list"
    data: list[str]


def endpoint_object(endpoint: WebhookEndpoint) -> EndpointObject:
    return EndpointObject(
        id=endpoint.id,
        created_at=int(endpoint.created_at),
        updated_at=int(endpoint.updated_at),
        name=endpoint.name,
        url=endpoint.url,
        event_types=endpoint.event_types,
        signing_secret_hint=hint_of(endpoint.secret),
        enabled=endpoint.disabled_at is None,
        disabled_reason=endpoint.disabled_reason,
    )


def endpoint_with_secret(endpoint: WebhookEndpoint) -> EndpointWithSecret:
    return EndpointWithSecret(**endpoint_object(endpoint).model_dump(), signing_secret=endpoint.secret)
