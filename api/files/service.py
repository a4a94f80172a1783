"""What can be done with files that are already there. A file past its `expires_at` is gone, for everybody but the jobs
that already use it."""

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from api.idempotency import forget_object
from api.pagination import unknown_cursor
from api.state import ApiState
from core.audit import SERVER, Actor, record
from core.database import unix_now
from core.errors import Conflict, NotFound
from core.storage import discard
from core.tables.files import File
from core.tables.jobs import UNFINISHED_STATUSES, Job


def files_of(project_id: str) -> Select[File]:
    return select(File).where(File.project_id == project_id, or_(File.expires_at.is_(None), File.expires_at > unix_now()))


def find_file(session: Session, project_id: str, file_id: str) -> File | None:
    return session.scalar(files_of(project_id).where(File.id == file_id))


def get_file(state: ApiState, file_id: str) -> File:
    """A file that is known to be there, and whose."""
    with state.database.reading() as session:
        return session.get_one(File, file_id)


def list_files(state: ApiState, project_id: str, *, after: str | None, limit: int, newest_first: bool, purpose: str | None) -> list[File]:
    """Up to `limit` + 1 files. Ids sort by creation."""
    statement = files_of(project_id).order_by(File.id.desc() if newest_first else File.id).limit(limit + 1)
    if purpose is not None:
        statement = statement.where(File.purpose == purpose)
    with state.database.reading() as session:
        if after is not None:
            if find_file(session, project_id, after) is None:
                raise unknown_cursor(after)
            statement = statement.where(File.id < after if newest_first else File.id > after)
        return list(session.scalars(statement))


def delete_file(state: ApiState, file: File, actor: Actor) -> bool:
    """Row first, then the bytes. Returns False where storage could not be reached for them. Raises Conflict while an unfinished job needs
    the file."""
    with state.database.transaction() as session:
        locked = session.scalar(select(File).where(File.id == file.id).with_for_update())
        if locked is None:
            raise NotFound(f"No such File object: {file.id}", param="file_id")
        if job_id := session.scalar(_unfinished_jobs_with(file.id).limit(1)):
            raise Conflict(f"the file {file.id} is used by the unfinished job {job_id}; cancel the job first", code="file_in_use")
        session.delete(locked)
        forget_object(session, file.id)
        record(session, actor, "file.deleted", project_id=file.project_id, object_id=file.id)
    return discard(state.storage, file.storage_key)


def delete_expired_files(state: ApiState) -> int:
    """Rows and bytes of expired files that no unfinished job needs. Returns how many. Where storage can't be reached the others are left
    for the next time: every try takes long."""
    with state.database.reading() as session:
        expired = session.scalars(select(File).where(File.expires_at <= unix_now())).all()
    deleted = 0
    for file in expired:
        try:
            reached = delete_file(state, file, SERVER)
        except (Conflict, NotFound):  # needed a while longer, or gone already
            continue
        deleted += 1
        if not reached:
            break
    return deleted


def _unfinished_jobs_with(file_id: str) -> Select[str]:
    used = or_(Job.training_file_id == file_id, Job.validation_file_id == file_id, Job.method["sdft"]["retention_file"].as_string() == file_id)
    return select(Job.id).where(used, Job.status.in_(UNFINISHED_STATUSES))
