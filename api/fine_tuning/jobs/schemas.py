"""Fine-tuning jobs on the wire, with their events, checkpoints and metrics."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.fine_tuning.jobs.queue_view import QueuePlace
from api.pagination import Identified
from api.strict_json import FIRST_ERROR_ENDS, WITHOUT_NUL, ObjectId, at_most
from core.tables.jobs import Checkpoint, Job, JobEvent

LARGEST_SEED = 2**31 - 1
MAX_METADATA = 16
Suffix = Annotated[str, Field(min_length=1, max_length=64), WITHOUT_NUL]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64), WITHOUT_NUL]
MetadataValue = Annotated[str, Field(max_length=512), WITHOUT_NUL]


class CreateJob(BaseModel):
    """What it does not know is ignored, as OpenAI does at this level. `method` is checked in api.fine_tuning.jobs.method."""

    model_config = ConfigDict(strict=True)

    model: ObjectId
    training_file: ObjectId
    validation_file: ObjectId | None = None
    method: dict[str, Any] | None = None
    hyperparameters: dict[str, Any] | None = None
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], at_most(MAX_METADATA)] | None = None
    integrations: Annotated[list[Any], FIRST_ERROR_ENDS] | None = None


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class Progress(BaseModel):
    step: int | None
    total_steps: int | None
    phase: str | None


class JobObject(Identified):
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    error: JobError | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    hyperparameters: dict[str, Any]
    """Numbers where they are known, "auto" before."""
    method: dict[str, Any]
    seed: int
    trained_tokens: int | None
    estimated_finish: int | None
    metadata: dict[str, Any] | None
    integrations: list[Any]
    user_provided_suffix: str | None
    queue_position: int | None
    """1 for the job that starts next; null unless queued."""
    estimated_start: int | None
    """Null unless queued, and where nobody can tell: no worker is there, or no job has succeeded yet."""
    progress: Progress | None
    attempt: int


class EventObject(Identified):
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None


class CheckpointObject(Identified):
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str | None
    """Null until the checkpoint can be used as a model."""
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


class MetricsList(BaseModel):
    """`data` holds `{step, created_at, …}`, ascending, thinned evenly where there are more points than asked for."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


def job_object(job: Job, place: QueuePlace | None) -> JobObject:
    kind = job.method["type"]
    hyperparameters = {**job.method[kind]["hyperparameters"], **(job.resolved_hyperparameters or {})}
    started = job.total_steps is not None or job.phase is not None
    return JobObject(
        id=job.id,
        created_at=int(job.created_at),
        finished_at=_seconds(job.finished_at),
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=job.project_id,
        status=job.status,
        error=None if job.error is None else JobError.model_validate(job.error),
        training_file=job.training_file_id,
        validation_file=job.validation_file_id,
        result_files=[job.result_file_id] if job.result_file_id else [],
        hyperparameters=hyperparameters,
        method={"type": kind, kind: {**job.method[kind], "hyperparameters": hyperparameters}},
        seed=job.seed,
        trained_tokens=job.trained_tokens,
        estimated_finish=_seconds(job.estimated_finish_at),
        metadata=job.job_metadata,
        integrations=[],
        user_provided_suffix=job.suffix,
        queue_position=place.position if place else None,
        estimated_start=_seconds(place.estimated_start) if place else None,
        progress=Progress(step=job.step, total_steps=job.total_steps, phase=job.phase) if started else None,
        attempt=job.attempt,
    )


def event_object(event: JobEvent) -> EventObject:
    return EventObject(id=event.id, created_at=int(event.created_at), level=event.level, message=event.message, type=event.type, data=event.data)


def checkpoint_object(checkpoint: Checkpoint) -> CheckpointObject:
    return CheckpointObject(
        id=checkpoint.id,
        created_at=int(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint.model_id,
        fine_tuning_job_id=checkpoint.job_id,
        step_number=checkpoint.step,
        metrics={"step": checkpoint.step, **checkpoint.metrics},
    )


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
