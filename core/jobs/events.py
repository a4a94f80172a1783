"""Events and metrics of a job, written inside the transaction of the change they describe."""

from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.database import insert_for, unix_now
from core.ids import new_id
from core.tables.jobs import Job, JobEvent, JobMetrics

Level = Literal["info", "warn", "error"]


def append_event(
    session: Session, job_id: str, message: str, *, level: Level = "info", type: Literal["message", "metrics"] = "message", data: dict[str, Any] | None = None
) -> None:
    """Add an event. Those of one job become visible in the order of their sequence, so that whoever has read one has read all
    before it: the job's row is locked before the event gets its number, and stays locked until it is committed."""
    session.execute(select(Job.id).where(Job.id == job_id).with_for_update(key_share=True))
    session.add(JobEvent(id=new_id("ftevent"), job_id=job_id, created_at=unix_now(), level=level, type=type, message=message, data=data))


def upsert_metrics(session: Session, job_id: str, step: int, attempt: int, metrics: dict[str, Any]) -> None:
    """One row a step: a step replayed after a resume replaces the old measurement."""
    changed = {"attempt": attempt, "created_at": unix_now(), "metrics": metrics}
    statement = insert_for(session, JobMetrics).values(job_id=job_id, step=step, **changed)
    session.execute(statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=changed))
