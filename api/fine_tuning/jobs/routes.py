from typing import Annotated

from fastapi import APIRouter, Query

from api.fine_tuning.jobs import service
from api.fine_tuning.jobs.creation import create_job
from api.fine_tuning.jobs.dependencies import MetadataFilter, OwnedJob
from api.fine_tuning.jobs.schemas import CheckpointObject, CreateJob, EventObject, JobObject, MetricsList, checkpoint_object, event_object
from api.pagination import After, Page, page_of
from api.state import ProjectId, State
from api.strict_json import StrictJsonRoute

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], route_class=StrictJsonRoute)
Limit = Annotated[int, Query(ge=1, le=1000)]
LARGEST_STEP = 2**31 - 1
"""What the database's column holds."""


@router.post("")
def create(request: CreateJob, state: State, project_id: ProjectId) -> JobObject:
    return service.describe(state, create_job(state, project_id, request))


@router.get("")
def list_jobs(state: State, project_id: ProjectId, metadata: MetadataFilter, after: After = None, limit: Limit = 20) -> Page[JobObject]:
    return page_of(service.list_jobs(state, project_id, after=after, limit=limit, metadata=metadata), limit)


@router.get("/{job_id}")
def get_job(job: OwnedJob, state: State) -> JobObject:
    return service.describe(state, job)


@router.post("/{job_id}/cancel")
def cancel_job(job: OwnedJob, state: State) -> JobObject:
    return service.cancel_job(state, job)


@router.post("/{job_id}/pause")
def pause_job(job: OwnedJob, state: State) -> JobObject:
    return service.pause_job(state, job)


@router.post("/{job_id}/resume")
def resume_job(job: OwnedJob, state: State) -> JobObject:
    return service.resume_job(state, job)


@router.get("/{job_id}/events")
def list_events(job: OwnedJob, state: State, after: After = None, limit: Limit = 20) -> Page[EventObject]:
    return page_of([event_object(event) for event in service.list_events(state, job, after=after, limit=limit)], limit)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job: OwnedJob, state: State, after: After = None, limit: Limit = 10) -> Page[CheckpointObject]:
    checkpoints = service.list_checkpoints(state, job, after=after, limit=limit)
    return page_of([checkpoint_object(checkpoint) for checkpoint in checkpoints], limit)


@router.get("/{job_id}/metrics")
def get_metrics(
    job: OwnedJob,
    state: State,
    since_step: Annotated[int, Query(ge=0, le=LARGEST_STEP)] = 0,
    max_points: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> MetricsList:
    return MetricsList(data=service.metrics_of(state, job, since_step=since_step, max_points=max_points))
