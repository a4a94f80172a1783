from functools import partial
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query

from api.idempotency import JsonCreation
from api.pagination import After, Page, page_of
from api.state import ProjectId, RequestActor, State
from api.strict_json import StrictJsonRoute
from api.webhooks import service
from api.webhooks.dependencies import OwnedEndpoint
from api.webhooks.schemas import (
    CreateEndpoint,
    DeletedEndpoint,
    EndpointObject,
    EndpointWithSecret,
    EventTypeList,
    RotateSecret,
    TestEndpoint,
    TestResult,
    UpdateEndpoint,
    endpoint_object,
    endpoint_with_secret,
)
from core.webhooks.events import EVENT_TYPES

router = APIRouter(prefix="/v1", tags=["webhooks"], route_class=StrictJsonRoute)
Limit = Annotated[int, Query(ge=1, le=100)]


@router.get("/webhook_event_types")
def list_event_types() -> EventTypeList:
    return EventTypeList(data=list(EVENT_TYPES))


@router.post("/webhook_endpoints")
def create(request: CreateEndpoint, state: State, project_id: ProjectId, actor: RequestActor, creation: JsonCreation) -> EndpointWithSecret:
    return endpoint_with_secret(service.create_endpoint(state, project_id, actor, creation, request))


@router.get("/webhook_endpoints")
def list_endpoints(state: State, project_id: ProjectId, after: After = None, limit: Limit = 20) -> Page[EndpointObject]:
    return page_of([endpoint_object(endpoint) for endpoint in service.list_endpoints(state, project_id, after=after, limit=limit)], limit)


@router.get("/webhook_endpoints/{webhook_endpoint_id}")
def get_endpoint(endpoint: OwnedEndpoint) -> EndpointObject:
    return endpoint_object(endpoint)


@router.post("/webhook_endpoints/{webhook_endpoint_id}")
def update(endpoint: OwnedEndpoint, state: State, actor: RequestActor, request: UpdateEndpoint) -> EndpointObject:
    return endpoint_object(service.update_endpoint(state, endpoint, actor, request))


@router.delete("/webhook_endpoints/{webhook_endpoint_id}")
def delete(endpoint: OwnedEndpoint, state: State, actor: RequestActor) -> DeletedEndpoint:
    service.delete_endpoint(state, endpoint, actor)
    return DeletedEndpoint(id=endpoint.id, deleted=True)


@router.post("/webhook_endpoints/{webhook_endpoint_id}/rotate_secret")
def rotate_secret(endpoint: OwnedEndpoint, state: State, actor: RequestActor, request: RotateSecret | None = None) -> EndpointWithSecret:
    wanted = request or RotateSecret()
    return endpoint_with_secret(service.rotate_secret(state, endpoint, actor, keep_old=wanted.keep_old_secret_active_for_24_hours))


@router.post("/webhook_endpoints/{webhook_endpoint_id}/test")
async def test(endpoint: OwnedEndpoint, state: State, request: TestEndpoint) -> TestResult:
    service.check_test_slots(state)
    send = partial(service.send_test, state, endpoint, request.event_type)
    status = await anyio.to_thread.run_sync(send, limiter=state.webhook_tests)  # other requests' threads don't wait behind it
    return TestResult(webhook_endpoint_id=endpoint.id, event_type=request.event_type, status_code=status)
