"""Events and metrics of a job, written inside the transaction of the change they describe."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.database import insert_for, unix_now
from core.ids import new_id
from core.storable import without_nul
from core.tables.jobs import Job, JobEvent, JobMetrics

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


@dataclass(frozen=True)
class NewEvent:
    """The same one written again, where the answer to a commit was lost, is one event."""

    message: str
    level: Level = "info"
    type: EventType = "message"
    data: dict[str, Any] | None = None
    id: str = field(default_factory=lambda: new_id("ftevent"))


def append_event(
    session: Session, job_id: str, message: str, *, level: Level = "info", type: EventType = "message", data: dict[str, Any] | None = None
) -> None:
    """Add an event; see append_events."""
    append_events(session, job_id, [NewEvent(message, level, type, data)])


def append_events(session: Session, job_id: str, events: Iterable[NewEvent]) -> None:
    """Add events, in order. Those of one job become visible in the order of their sequence, so that whoever has read one has read all
    before it: the job's row is locked before an event gets its number, and stays locked until it is committed."""
    session.execute(select(Job.id).where(Job.id == job_id).with_for_update(key_share=True))
    now = unix_now()
    rows = [
        {"id": event.id, "job_id": job_id, "created_at": now, "level": event.level, "type": event.type}
        | {"message": without_nul(event.message), "data": without_nul(event.data)}
        for event in events
    ]
    if rows:
        session.execute(insert_for(session, JobEvent).on_conflict_do_nothing(index_elements=["id"]), rows)


def upsert_metrics(session: Session, job_id: str, attempt: int, metrics: dict[int, dict[str, Any]]) -> None:
    """`metrics` by step. One row a step: a step replayed after a resume replaces the old measurement."""
    if not metrics:
        return
    now = unix_now()
    rows = [{"job_id": job_id, "step": step, "attempt": attempt, "created_at": now, "metrics": measured} for step, measured in metrics.items()]
    statement = insert_for(session, JobMetrics).values(rows)
    replaced = {name: statement.excluded[name] for name in ("attempt", "created_at", "metrics")}
    session.execute(statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=replaced))
