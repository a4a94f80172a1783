"""GET /organization/audit_logs: who changed what, newest first."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict
from sqlalchemy import ColumnElement, select

from api.pagination import After, Identified, Page, page_of, unknown_cursor
from api.state import ApiState, State
from core.tables.audit import AuditEvent
from core.tables.projects import Project

router = APIRouter(prefix="/v1/organization/audit_logs", tags=["administration"])


class ActingKey(BaseModel):
    id: str


class ActorObject(BaseModel):
    type: Literal["api_key", "server"]
    api_key: ActingKey | None


class AuditedProject(BaseModel):
    id: str
    name: str


class AuditLogObject(Identified):
    """Beside these fields one with the name that is in `type`: the object's id, and what was asked for."""

    model_config = ConfigDict(extra="allow")

    object: Literal["organization.audit_log"] = "organization.audit_log"
    type: str
    effective_at: int
    actor: ActorObject
    project: AuditedProject
    request_id: str | None


async def _conditions(
    event_types: Annotated[list[str] | None, Query(alias="event_types[]")] = None,
    project_ids: Annotated[list[str] | None, Query(alias="project_ids[]")] = None,
    actor_ids: Annotated[list[str] | None, Query(alias="actor_ids[]")] = None,
    resource_ids: Annotated[list[str] | None, Query(alias="resource_ids[]")] = None,
) -> list[ColumnElement[bool]]:
    """Lists in the query, as the OpenAI client writes them."""
    columns = {AuditEvent.action: event_types, AuditEvent.project_id: project_ids, AuditEvent.actor_key_id: actor_ids, AuditEvent.object_id: resource_ids}
    return [column.in_(values) for column, values in columns.items() if values is not None]


@router.get("")
def list_audit_logs(
    state: State,
    conditions: Annotated[list[ColumnElement[bool]], Depends(_conditions)],
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[AuditLogObject]:
    return page_of(_list(state, conditions, after, limit), limit)


def _list(state: ApiState, conditions: list[ColumnElement[bool]], after: str | None, limit: int) -> list[AuditLogObject]:
    """Up to `limit` + 1 entries."""
    statement = select(AuditEvent, Project.name).join(Project, Project.id == AuditEvent.project_id).where(*conditions)
    with state.database.reading() as session:
        if after is not None:
            if session.get(AuditEvent, after) is None:
                raise unknown_cursor(after)
            statement = statement.where(AuditEvent.id < after)
        rows = session.execute(statement.order_by(AuditEvent.id.desc()).limit(limit + 1)).all()
    return [_audit_log_object(row.AuditEvent, row.name) for row in rows]


def _audit_log_object(event: AuditEvent, project_name: str) -> AuditLogObject:
    key_id = event.actor_key_id
    return AuditLogObject(
        id=event.id,
        type=event.action,
        effective_at=int(event.created_at),
        actor=ActorObject(type="server", api_key=None) if key_id is None else ActorObject(type="api_key", api_key=ActingKey(id=key_id)),
        project=AuditedProject(id=event.project_id, name=project_name),
        request_id=event.request_id,
        **{event.action: {"id": event.object_id, **(event.details or {})}},
    )
