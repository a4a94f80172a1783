"""Managing projects: for keys with the scope admin, which may touch every project."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.organization.acting_key import lasting_admin_keys, refuse_lockout, require_acting_key
from api.organization.projects.schemas import CreateProject, UpdateProject
from api.pagination import unknown_cursor
from api.state import ApiState
from core.audit import Actor, record
from core.errors import Conflict
from core.projects import FIRST_PROJECT, archive_project, create_project, valid_project_name
from core.tables.projects import ApiKey, Project


def list_projects(state: ApiState, *, after: str | None, limit: int, include_archived: bool) -> list[Project]:
    """Up to `limit` + 1 projects, newest first."""
    statement = select(Project).order_by(Project.id.desc()).limit(limit + 1)
    if not include_archived:
        statement = statement.where(Project.archived_at.is_(None))
    with state.database.reading() as session:
        if after is not None:
            if session.get(Project, after) is None:
                raise unknown_cursor(after)
            statement = statement.where(Project.id < after)
        return list(session.scalars(statement))


def create(state: ApiState, actor: Actor, request: CreateProject) -> Project:
    """Raises BadRequest on a name that can't be one, Conflict on one that is taken."""
    with _refusing_taken_names(request.name), state.database.transaction() as session:
        require_acting_key(session, actor)
        return create_project(session, request.name, max_running_jobs=request.max_running_jobs, actor=actor)


def update(state: ApiState, actor: Actor, project_id: str, request: UpdateProject) -> Project:
    """Models that were trained before a change of the name keep theirs. Raises Conflict on an archived project."""
    changes: dict[str, Any] = {} if request.name is None else {"name": valid_project_name(request.name)}
    if "max_running_jobs" in request.model_fields_set:
        changes["max_running_jobs"] = request.max_running_jobs
    with _refusing_taken_names(request.name), state.database.transaction() as session:
        require_acting_key(session, actor)
        project = active_project(session, project_id)
        if project.name == FIRST_PROJECT and request.name not in (None, FIRST_PROJECT):
            raise _first_project_stays("renamed")
        for name, value in changes.items():
            setattr(project, name, value)
        if changes:
            record(session, actor, "project.updated", project_id=project_id, object_id=project_id, changes_requested=changes)
    return project


def archive(state: ApiState, actor: Actor, project_id: str) -> Project:
    """Does nothing where it is archived already. Raises Conflict where nobody could undo it."""
    with state.database.transaction() as session:
        require_acting_key(session, actor)
        project = _locked(session, project_id)
        if project.name == FIRST_PROJECT:
            raise _first_project_stays("archived")
        if actor.key_id is not None and session.get_one(ApiKey, actor.key_id).project_id == project_id:
            raise Conflict(f"the key of this request belongs to the project {project.name}; archive it with a key of another one", code="own_project")
        if project.archived_at is None:
            before = lasting_admin_keys(session)
            archive_project(session, project, actor)
            refuse_lockout(session, before)
    return project


def active_project(session: Session, project_id: str) -> Project:
    """Locked until the transaction ends. Raises Conflict where it is archived."""
    project = _locked(session, project_id)
    if project.archived_at is not None:
        raise Conflict(f"the project {project.name} is archived", code="project_archived", param="project_id")
    return project


def _locked(session: Session, project_id: str) -> Project:
    return session.scalars(select(Project).where(Project.id == project_id).with_for_update()).one()


def _first_project_stays(what: str) -> Conflict:
    return Conflict(f"the project {FIRST_PROJECT} can't be {what}: a lost admin.key is replaced by a key for it", code="first_project", param="project_id")


@contextmanager
def _refusing_taken_names(name: str | None) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise Conflict(f"there is a project called {name} already, perhaps an archived one", code="project_exists", param="name") from error
