from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from api.fine_tuning.jobs import service
from api.fine_tuning.jobs.creation import create_job
from api.fine_tuning.jobs.dependencies import MetadataFilter, OwnedJob
from api.fine_tuning.jobs.event_stream import stream_events
from api.fine_tuning.jobs.schemas import CheckpointObject, CreateJob, EventObject, JobObject, MetricsList, checkpoint_object, event_object
from api.idempotency import IsLaterTry, JsonCreation
from api.pagination import After, Page, page_of
from api.state import KeyId, ProjectId, RequestActor, State
from api.strict_json import StrictJsonRoute

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], route_class=StrictJsonRoute)
Limit = Annotated[int, Query(ge=1, le=1000)]
LARGEST_STEP = 2**31 - 1
"""What the database's column holds."""


@router.post("")
def create(request: CreateJob, state: State, project_id: ProjectId, actor: RequestActor, creation: JsonCreation) -> JobObject:
    return service.describe(state, create_job(state, project_id, actor, creation, request))


@router.get("")
def list_jobs(state: State, project_id: ProjectId, metadata: MetadataFilter, after: After = None, limit: Limit = 20) -> Page[JobObject]:
    return page_of(service.list_jobs(state, project_id, after=after, limit=limit, metadata=metadata), limit)


@router.get("/{job_id}")
async def get_job(job: OwnedJob, state: State) -> JobObject:
    return await service.describe_without_waiting(state, job)


@router.post("/{job_id}/cancel")
def cancel_job(job: OwnedJob, state: State, actor: RequestActor, is_later_try: IsLaterTry) -> JobObject:
    return service.cancel_job(state, job, actor, is_later_try=is_later_try)


@router.post("/{job_id}/pause")
def pause_job(job: OwnedJob, state: State, actor: RequestActor) -> JobObject:
    return service.pause_job(state, job, actor)


@router.post("/{job_id}/resume")
def resume_job(job: OwnedJob, state: State, actor: RequestActor) -> JobObject:
    return service.resume_job(state, job, actor)


@router.get(
    "/{job_id}/events",
    response_model=Page[EventObject],
    responses={200: {"content": {"text/event-stream": {}}}, 204: {"description": "Nothing follows after Last-Event-ID."}},
)
def list_events(
    job: OwnedJob,
    state: State,
    key_id: KeyId,
    after: After = None,
    limit: Limit = 20,
    stream: bool = False,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Page[EventObject] | Response:
    if stream:
        return stream_events(state, job, after=after, last_event_id=last_event_id, key_id=key_id)
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
