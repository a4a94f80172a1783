"""Reading, cancelling, pausing and resuming jobs. Creating them is in api.fine_tuning.jobs.creation."""

from collections.abc import Callable
from typing import Any

import anyio.to_thread
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from api.fine_tuning.jobs.schemas import JobObject, job_object
from api.pagination import unknown_cursor
from api.state import ApiState
from core.audit import Action, Actor, record
from core.errors import BadRequest
from core.jobs.transitions import request_cancellation, request_pause, resume
from core.tables.jobs import Checkpoint, Job, JobEvent, JobMetrics
from core.tables.models import Model


def describe(state: ApiState, job: Job) -> JobObject:
    """The job on the wire, with its place in the queue."""
    return job_object(job, state.queue.place_of(job.id) if job.status == "queued" else None)


async def describe_without_waiting(state: ApiState, job: Job) -> JobObject:
    """The same in an event loop: a thread is only needed to look at the queue."""
    return job_object(job, None) if job.status != "queued" else await anyio.to_thread.run_sync(describe, state, job)


def list_jobs(state: ApiState, project_id: str, *, after: str | None, limit: int, metadata: dict[str, str]) -> list[JobObject]:
    """Up to `limit` + 1 jobs, newest first, that carry all of `metadata`."""
    statement = select(Job).where(Job.project_id == project_id).order_by(Job.id.desc()).limit(limit + 1)
    with state.database.reading() as session:
        if after is not None:
            if session.scalar(select(Job.id).where(Job.project_id == project_id, Job.id == after)) is None:
                raise unknown_cursor(after)
            statement = statement.where(Job.id < after)
        for key, value in metadata.items():
            statement = statement.where(_has_metadata(session, key, value))
        jobs = session.scalars(statement).all()
    return [describe(state, job) for job in jobs]


def cancel_job(state: ApiState, job: Job, actor: Actor, *, is_later_try: bool) -> JobObject:
    """Raises BadRequest on a job that has already ended; not on one that is cancelled where an earlier try may have asked for that."""
    return _changed(state, job, actor, request_cancellation, "fine_tuning.job.cancelled", accepted_end="cancelled" if is_later_try else None)


def pause_job(state: ApiState, job: Job, actor: Actor) -> JobObject:
    """Idempotent. Raises BadRequest on a job that has already ended."""
    return _changed(state, job, actor, request_pause, "fine_tuning.job.paused")


def resume_job(state: ApiState, job: Job, actor: Actor) -> JobObject:
    """Idempotent: a job that is not paused stays as it is. Raises BadRequest on a job that has already ended."""
    return _changed(state, job, actor, resume, "fine_tuning.job.resumed")


def _changed(state: ApiState, job: Job, actor: Actor, change: Callable[[Session, str], bool], action: Action, *, accepted_end: str | None = None) -> JobObject:
    with state.database.transaction() as session:
        possible = change(session, job.id)
        current = session.get_one(Job, job.id, populate_existing=True)
        if not possible and current.status == accepted_end:
            return describe(state, current)
        if not possible:
            done = action.rpartition(".")[2]
            raise BadRequest(f"the job {job.id} has ended ({current.status}) and can't be {done}", code="job_already_finished", param="fine_tuning_job_id")
        record(session, actor, action, project_id=job.project_id, object_id=job.id)
    state.doorbell.ring()
    return describe(state, current)


def list_events(state: ApiState, job: Job, *, after: str | None, limit: int) -> list[JobEvent]:
    """Up to `limit` + 1 events, newest first."""
    statement = select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.sequence.desc()).limit(limit + 1)
    with state.database.reading() as session:
        if after is not None:
            sequence = session.scalar(select(JobEvent.sequence).where(JobEvent.job_id == job.id, JobEvent.id == after))
            if sequence is None:
                raise unknown_cursor(after)
            statement = statement.where(JobEvent.sequence < sequence)
        return list(session.scalars(statement))


def list_checkpoints(state: ApiState, job: Job, *, after: str | None, limit: int) -> list[Checkpoint]:
    """Up to `limit` + 1 checkpoints, newest first: those whose models were not deleted."""
    deleted = select(Model.id).where(Model.id == Checkpoint.model_id, Model.status == "deleted").exists()
    statement = select(Checkpoint).where(Checkpoint.job_id == job.id, ~deleted).order_by(Checkpoint.step.desc()).limit(limit + 1)
    with state.database.reading() as session:
        if after is not None:
            step = session.scalar(select(Checkpoint.step).where(Checkpoint.job_id == job.id, Checkpoint.id == after))
            if step is None:
                raise unknown_cursor(after)
            statement = statement.where(Checkpoint.step < step)
        return list(session.scalars(statement))


def metrics_of(state: ApiState, job: Job, *, since_step: int, max_points: int) -> list[dict[str, Any]]:
    """Measurements of the steps after `since_step`, ascending: at most `max_points`, evenly spread, always with the last."""
    with state.database.reading() as session:
        steps = session.scalars(select(JobMetrics.step).where(JobMetrics.job_id == job.id, JobMetrics.step > since_step).order_by(JobMetrics.step)).all()
        shown = [steps[index] for index in evenly_spread(len(steps), max_points)]
        rows = session.scalars(select(JobMetrics).where(JobMetrics.job_id == job.id, JobMetrics.step.in_(shown)).order_by(JobMetrics.step)).all()
    return [{**row.metrics, "step": row.step, "created_at": int(row.created_at)} for row in rows]


def evenly_spread(count: int, most: int) -> list[int]:
    """At most `most` of the indexes 0 to `count` - 1, evenly spread; the last one is always among them."""
    if count <= most:
        return list(range(count))
    return sorted({(count * (index + 1)) // most - 1 for index in range(most)})


def _has_metadata(session: Session, key: str, value: str) -> ColumnElement[bool]:
    """Compares keys and values as bound text: a JSON path would give quotes and dots in a key a meaning."""
    each = func.jsonb_each_text if session.get_bind().dialect.name == "postgresql" else func.json_each
    pair = each(Job.job_metadata).table_valued("key", "value")
    return select(pair.c.key).where(pair.c.key == key, pair.c.value == value).exists()
