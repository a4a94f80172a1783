from typing import Annotated

from fastapi import APIRouter, Query

from api.organization.api_keys import service
from api.organization.api_keys.schemas import ApiKeyObject, CreateApiKey, CreatedApiKey, DeletedApiKey, api_key_object
from api.organization.projects.dependencies import KnownProject
from api.pagination import After, Page, page_of
from api.state import RequestActor, State
from api.strict_json import StrictJsonRoute

router = APIRouter(prefix="/v1/organization/projects/{project_id}/api_keys", tags=["administration"], route_class=StrictJsonRoute)


@router.get("")
def list_keys(project: KnownProject, state: State, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Page[ApiKeyObject]:
    return page_of([api_key_object(key) for key in service.list_keys(state, project.id, after=after, limit=limit)], limit)


@router.post("")
def create_key(project: KnownProject, request: CreateApiKey, state: State, actor: RequestActor) -> CreatedApiKey:
    key, plain_key = service.create(state, actor, project.id, request)
    return CreatedApiKey(**api_key_object(key).model_dump(), value=plain_key)


@router.get("/{key_id}")
def get_key(project: KnownProject, key_id: str, state: State) -> ApiKeyObject:
    return api_key_object(service.get_key(state, project.id, key_id))


@router.delete("/{key_id}")
def revoke_key(project: KnownProject, key_id: str, state: State, actor: RequestActor) -> DeletedApiKey:
    service.revoke(state, actor, project.id, key_id)
    return DeletedApiKey(id=key_id, deleted=True)
