"""Who is next: the order in which workers take queued jobs, as SQL for the claim and as a forecast for the users who wait.

1. Jobs that were training before (a worker was lost, a deploy, a pause) go on first.
2. Projects take turns: the one with the fewest running jobs, and among equals the one that was served longest ago.
3. Within a project the oldest job.

A project whose running jobs are as many as it may have waits, whatever else is free.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Select, and_, func, or_, select, text
from sqlalchemy.orm import Session, aliased

from core.database import database_now
from core.jobs.leases import claimable
from core.tables.jobs import Job
from core.tables.projects import Project

CLAIM_LOCK = 5_134_862_607_712_002
"""Postgres: held by whoever claims a job to train, so that nobody counts running jobs while another adds one."""


@dataclass(frozen=True)
class Waiting:
    """A queued job. `begun`: it was training before."""

    job_id: str
    project_id: str
    created_at: float
    begun: bool


@dataclass(frozen=True)
class ProjectLoad:
    """`running` jobs now, at most `limit` (None: no limit); `last_claimed_at` in unix seconds."""

    running: int
    limit: int | None
    last_claimed_at: float | None


def keep_claims_apart(session: Session) -> None:
    """One claim for training at a time, until the transaction ends. On SQLite every writing transaction is alone anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text(f"SELECT pg_advisory_xact_lock({CLAIM_LOCK})"))


def next_queued(max_running: int | None) -> Select[str]:
    """The queued jobs that may start, the next one first. `max_running`: of a project without a limit of its own."""
    other = aliased(Job)
    running = select(other.project_id, func.count().label("number")).where(other.status == "running").group_by(other.project_id).subquery()
    number = func.coalesce(running.c.number, 0)
    candidates = claimable("queued").join(Project, Project.id == Job.project_id).outerjoin(running, running.c.project_id == Job.project_id)
    limit = func.coalesce(Project.max_running_jobs, max_running)
    candidates = candidates.where(or_(limit.is_(None), number < limit))
    return candidates.order_by(Job.attempt == 0, number, Project.last_claimed_at.asc().nulls_first(), Job.created_at, Job.id)


def next_to_validate() -> Select[str]:
    """The jobs whose files wait to be validated, the next one first: of the project with the fewest jobs that are validated at the moment
    or wait validated for their training, so that nobody's job stands behind a thousand of another project's."""
    other = aliased(Job)
    in_hand = or_(other.status == "queued", and_(other.status == "validating_files", other.lease_until > database_now()))
    ready = select(other.project_id, func.count().label("number")).where(in_hand).group_by(other.project_id).subquery()
    candidates = claimable("validating_files").outerjoin(ready, ready.c.project_id == Job.project_id)
    return candidates.order_by(func.coalesce(ready.c.number, 0), Job.created_at, Job.id)


def work_waits(session: Session, max_running: int | None) -> bool:
    """Whether a claim for validation or for training would find a job; only reads, so that looking often costs no write lock."""
    waiting = (claimable("validating_files"), next_queued(max_running).order_by(None))
    return any(session.scalar(jobs.limit(1)) is not None for jobs in waiting)


def forecast(waiting: Iterable[Waiting], projects: dict[str, ProjectLoad]) -> list[str]:
    """The waiting jobs' ids in the order in which they will be taken, as far as that can be known: as if no running job ended before.
    Jobs that have to wait for their project's limit come after those that do not."""
    loads = {project_id: (load.running, load.last_claimed_at is not None, load.last_claimed_at or 0.0) for project_id, load in projects.items()}
    queues: dict[tuple[str, bool], list[Waiting]] = {}
    for job in sorted(waiting, key=lambda job: (job.created_at, job.job_id)):
        queues.setdefault((job.project_id, job.begun), []).append(job)
    heads = [_place(queue[0], loads, projects) for queue in queues.values()]
    heapq.heapify(heads)
    order: list[str] = []
    clock = max((last for _, _, last in loads.values()), default=0.0)
    positions = dict.fromkeys(queues, 0)
    while heads:
        place = heapq.heappop(heads)
        job = queues[place.queue][positions[place.queue]]
        current = _place(job, loads, projects)
        if current > place:  # its project was served since it was placed
            heapq.heappush(heads, current)
            continue
        order.append(job.job_id)
        clock += 1
        loads[job.project_id] = (loads[job.project_id][0] + 1, True, clock)
        positions[place.queue] += 1
        if positions[place.queue] < len(queues[place.queue]):
            heapq.heappush(heads, _place(queues[place.queue][positions[place.queue]], loads, projects))
    return order


def estimated_starts(order: list[str], free_at: list[float], seconds: float | None) -> dict[str, float]:
    """When the jobs of a forecast will start, in unix seconds, as far as that can be told: `free_at` says when each slot is free, and
    `seconds` how long a job takes (None: nobody knows, so that only the first job of each slot can be told of)."""
    slots = list(free_at)
    heapq.heapify(slots)
    starts: dict[str, float] = {}
    for job_id in order:
        if not slots:
            break
        starts[job_id] = heapq.heappop(slots)
        if seconds is not None:
            heapq.heappush(slots, starts[job_id] + seconds)
    return starts


@dataclass(frozen=True, order=True)
class _Place:
    key: tuple[bool, bool, int, bool, float, float, str]
    queue: tuple[str, bool]


def _place(job: Waiting, loads: dict[str, tuple[int, bool, float]], projects: dict[str, ProjectLoad]) -> _Place:
    running, served, last = loads[job.project_id]
    limit = projects[job.project_id].limit
    return _Place((limit is not None and running >= limit, not job.begun, running, served, last, job.created_at, job.job_id), (job.project_id, job.begun))
