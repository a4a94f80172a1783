"""Rows that tests begin with."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.database import Database, unix_now
from core.ids import new_id, new_webhook_id
from core.jobs.leases import Claim
from core.jobs.transitions import succeed
from core.projects import create_project
from core.tables.jobs import TERMINAL_STATUSES, Job, JobEvent
from core.tables.webhooks import WebhookDelivery, WebhookEndpoint
from core.webhooks.events import EVENT_TYPES
from core.webhooks.signing import new_secret

TERMINAL_MESSAGES = ("The job has successfully completed", "The job was cancelled", "The job failed")


def add_project(database: Database, name: str = "default") -> str:
    with database.transaction() as session:
        return create_project(session, name).id


def add_job(database: Database, project_id: str, status: str = "queued", **columns: Any) -> str:
    job_id = new_id("ftjob")
    defaults: dict[str, Any] = {
        "model": "tiny",
        "base_model": "tiny",
        "training_file_id": new_id("file"),
        "method": {"type": "sdft"},
        "seed": 1,
        "created_at": unix_now(),
    }
    with database.transaction() as session:
        session.add(Job(id=job_id, project_id=project_id, status=status, **(defaults | columns)))
    return job_id


def add_endpoint(database: Database, project_id: str, url: str = "https://hooks.example.com/", **columns: Any) -> str:
    """A webhook endpoint that wants every event."""
    endpoint_id = new_webhook_id("whe")
    now = unix_now()
    defaults: dict[str, Any] = {"name": "hook", "event_types": list(EVENT_TYPES), "secret": new_secret(), "created_at": now, "updated_at": now}
    with database.transaction() as session:
        session.add(WebhookEndpoint(id=endpoint_id, project_id=project_id, url=url, **(defaults | columns)))
    return endpoint_id


def get_endpoint(database: Database, endpoint_id: str) -> WebhookEndpoint:
    with database.reading() as session:
        return session.get_one(WebhookEndpoint, endpoint_id)


def deliveries_of(database: Database, endpoint_id: str) -> list[WebhookDelivery]:
    """Oldest first."""
    with database.reading() as session:
        return list(session.scalars(select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id).order_by(WebhookDelivery.id)))


def succeed_job(session: Session, claim: Claim) -> None:
    """As publishing its model ends a job."""
    succeed(session, claim, fine_tuned_model="ft:tiny:default::1", result_file_id="file-1", final_step=9, total_steps=9, trained_tokens=900)


def get_job(database: Database, job_id: str) -> Job:
    with database.reading() as session:
        return session.scalars(select(Job).where(Job.id == job_id)).one()


def messages_of(database: Database, job_id: str) -> list[str]:
    """The messages of a job's events, oldest first."""
    with database.reading() as session:
        return list(session.scalars(select(JobEvent.message).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)))


def assert_sound(database: Database, job_id: str) -> None:
    """What must hold of any job at any time: one terminal event if and only if it is finished, and nobody can lose it."""
    _assert_sound(get_job(database, job_id), messages_of(database, job_id))


def assert_all_sound(database: Database, project_id: str) -> list[Job]:
    """The same of all jobs of a project, which are returned."""
    with database.reading() as session:
        jobs = list(session.scalars(select(Job).where(Job.project_id == project_id)))
        events = session.execute(select(JobEvent.job_id, JobEvent.message).join(Job, Job.id == JobEvent.job_id).where(Job.project_id == project_id)).all()
    for job in jobs:
        _assert_sound(job, [message for job_id, message in events if job_id == job.id])
    return jobs


def _assert_sound(job: Job, messages: list[str]) -> None:
    terminal_events = [message for message in messages if message.startswith(TERMINAL_MESSAGES)]
    finished = job.status in TERMINAL_STATUSES
    assert len(terminal_events) == finished, terminal_events
    assert (job.finished_at is not None) == finished
    if finished:
        assert job.lease_token is None
    elif job.lease_token is None:
        assert job.stop_requested is None, "nobody holds this job and nobody can claim it: it is stuck"
        assert job.status in ("validating_files", "queued", "paused")
