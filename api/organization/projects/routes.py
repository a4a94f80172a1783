from typing import Annotated

from fastapi import APIRouter, Query

from api.organization.projects import service
from api.organization.projects.dependencies import KnownProject
from api.organization.projects.schemas import CreateProject, ProjectObject, UpdateProject, project_object
from api.pagination import After, Page, page_of
from api.state import RequestActor, State
from api.strict_json import StrictJsonRoute

router = APIRouter(prefix="/v1/organization/projects", tags=["administration"], route_class=StrictJsonRoute)


@router.get("")
def list_projects(state: State, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20, include_archived: bool = False) -> Page[ProjectObject]:
    projects = service.list_projects(state, after=after, limit=limit, include_archived=include_archived)
    return page_of([project_object(project) for project in projects], limit)


@router.post("")
def create_project(request: CreateProject, state: State, actor: RequestActor) -> ProjectObject:
    return project_object(service.create(state, actor, request))


@router.get("/{project_id}")
def get_project(project: KnownProject) -> ProjectObject:
    return project_object(project)


@router.post("/{project_id}")
def update_project(project: KnownProject, request: UpdateProject, state: State, actor: RequestActor) -> ProjectObject:
    return project_object(service.update(state, actor, project.id, request))


@router.post("/{project_id}/archive")
def archive_project(project: KnownProject, state: State, actor: RequestActor) -> ProjectObject:
    return project_object(service.archive(state, actor, project.id))
