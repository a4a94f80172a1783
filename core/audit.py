"""The audit log: one row for each change that somebody may have to answer for, in the transaction of the change. There is no
function that changes a row, and the database refuses it (triggers of the migrations)."""

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy.orm import Session

from core.database import unix_now
from core.ids import new_id
from core.tables.audit import AuditEvent

Action = Literal[
    "api_key.created",
    "api_key.deleted",
    "project.created",
    "project.updated",
    "project.archived",
    "file.deleted",
    "model.deleted",
    "fine_tuning.job.created",
    "fine_tuning.job.cancelled",
    "fine_tuning.job.paused",
    "fine_tuning.job.resumed",
    "webhook_endpoint.created",
    "webhook_endpoint.updated",
    "webhook_endpoint.secret_rotated",
    "webhook_endpoint.deleted",
]
"""OpenAI's names where it has one. A key is deleted by revoking it; a job counts as cancelled, paused or resumed when somebody asks for it."""


@dataclass(frozen=True)
class Actor:
    """Who asks for a change: a request with a key; with neither, the server by itself."""

    key_id: str | None
    request_id: str | None


SERVER = Actor(None, None)


def record(session: Session, actor: Actor, action: Action, *, project_id: str, object_id: str, **details: Any) -> None:
    """`project_id`: whose object it is. `details`: what was asked for, JSON under OpenAI's names for that action (`data`,
    `changes_requested`); never a secret."""
    session.add(
        AuditEvent(
            id=new_id("audit_log"),
            created_at=unix_now(),
            action=action,
            project_id=project_id,
            object_id=object_id,
            actor_key_id=actor.key_id,
            request_id=actor.request_id,
            details=details or None,
        )
    )
