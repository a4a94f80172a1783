"""Which workers there are."""

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from core.database import database_now, insert_for, unix_now
from core.tables.workers import Worker

TELL_SECONDS = 10.0
GONE_SECONDS = 35.0
"""Without a word for so long a worker is not counted any more."""
FORGOTTEN_SECONDS = 86_400.0


def tell_presence(session: Session, worker_id: str, host: str, devices: list[list[str]]) -> None:
    """This worker is there, with one slot for each entry of `devices`. Rows of workers that went a day ago are removed."""
    told = {"host": host, "slots": len(devices), "devices": devices, "seen_at": database_now()}
    statement = insert_for(session, Worker).values(id=worker_id, started_at=unix_now(), **told)
    session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=told))
    session.execute(delete(Worker).where(Worker.seen_at < database_now() - FORGOTTEN_SECONDS))


def leave(session: Session, worker_id: str) -> None:
    session.execute(delete(Worker).where(Worker.id == worker_id))


def workers_that_are_there(session: Session) -> list[Worker]:
    return list(session.scalars(select(Worker).where(Worker.seen_at > database_now() - GONE_SECONDS).order_by(Worker.started_at)))
