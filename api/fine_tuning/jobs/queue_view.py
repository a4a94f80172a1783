"""Where the queued jobs stand, and when they will start: read at most once a second, however many clients poll."""

import statistics
import threading
import time
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.database import Database, unix_now
from core.jobs.queue import ProjectLoad, Waiting, estimated_starts, forecast
from core.tables.jobs import Job
from core.tables.projects import Project
from core.workers import workers_that_are_there

FRESH_SECONDS = 1.0
LATEST_JOBS = 20
"""Whose median duration is taken for that of the next."""


@dataclass(frozen=True)
class QueuePlace:
    """`position` from 1; `estimated_start` in unix seconds, None where nobody can tell."""

    position: int
    estimated_start: float | None


class QueueView:
    """Safe for several threads. `max_running`: jobs of a project without a limit of its own that run at a time."""

    def __init__(self, database: Database, max_running: int | None) -> None:
        self._database = database
        self._max_running = max_running
        self._reading = threading.Lock()
        self._read_at = float("-inf")
        self._places: dict[str, QueuePlace] = {}

    def place_of(self, job_id: str) -> QueuePlace | None:
        """None for a job that was not queued when the queue was last read. While one caller reads it anew, the others get what was there
        before: a database that is slow holds up one thread here. Raises Unavailable."""
        if time.monotonic() - self._read_at > FRESH_SECONDS and self._reading.acquire(blocking=False):
            try:
                with self._database.reading() as session:
                    self._places = self._read(session)
                self._read_at = time.monotonic()
            finally:
                self._reading.release()
        return self._places.get(job_id)

    def _read(self, session: Session) -> dict[str, QueuePlace]:
        queued = session.execute(select(Job.id, Job.project_id, Job.created_at, Job.attempt).where(Job.status == "queued")).all()
        if not queued:
            return {}
        running = session.execute(select(Job.project_id, Job.estimated_finish_at).where(Job.status == "running")).all()
        numbers: dict[str, int] = {}
        for row in running:
            numbers[row.project_id] = numbers.get(row.project_id, 0) + 1
        waiting_projects = session.scalars(select(Project).where(Project.id.in_({row.project_id for row in queued})))
        loads = {
            project.id: ProjectLoad(numbers.get(project.id, 0), project.max_running_jobs or self._max_running, project.last_claimed_at)
            for project in waiting_projects
        }
        order = forecast([Waiting(row.id, row.project_id, row.created_at, row.attempt > 0) for row in queued], loads)
        seconds = _usual_seconds(session)
        slots = sum(worker.slots for worker in workers_that_are_there(session))
        starts = estimated_starts(order, _free_at([row.estimated_finish_at for row in running], slots, seconds), seconds)
        return {job_id: QueuePlace(place, starts.get(job_id)) for place, job_id in enumerate(order, start=1)}


def _free_at(finishes: list[float | None], slots: int, seconds: float | None) -> list[float]:
    """When each slot is free: at the estimated end of the job in it or, where there is no estimate yet, after the usual time."""
    now = unix_now()
    known = [finish if finish is not None else None if seconds is None else now + seconds for finish in finishes]
    return [max(now, finish) for finish in known if finish is not None] + [now] * (slots - len(finishes))


def _usual_seconds(session: Session) -> float | None:
    """The median of the latest jobs' training times, or None where none has succeeded yet."""
    taken = func.coalesce(Job.finished_at, 0) - func.coalesce(Job.started_at, 0)
    latest = session.scalars(
        select(taken).where(Job.status == "succeeded", Job.started_at.is_not(None)).order_by(Job.finished_at.desc()).limit(LATEST_JOBS)
    ).all()
    return float(statistics.median(latest)) if latest else None
