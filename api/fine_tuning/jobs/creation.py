"""POST /fine_tuning/jobs: everything about a job that can be checked without a tokenizer is checked here."""

import secrets
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.files.service import files_of
from api.fine_tuning.jobs.method import resolve_method
from api.fine_tuning.jobs.schemas import LARGEST_SEED, CreateJob, job_object
from api.idempotency import AlreadyCreated, Creation, record_creation, refuse_repetition
from api.state import ApiState
from core.audit import Actor, record
from core.base_models import made_from_of
from core.errors import BadRequest, ModelNotFound
from core.jobs import transitions
from core.logging import get_logger
from core.settings import Settings
from core.tables.files import File
from core.tables.jobs import UNFINISHED_STATUSES, Job
from core.tables.models import Model
from core.tracing import current_trace_parent
from sdft_engine.contract.probes import MAX_FILE_BYTES as MAX_RETENTION_BYTES
from sdft_engine.contract.probes import PARAM as RETENTION_PARAM
from sdft_engine.contract.quoting import quoted

RETENTION_PURPOSES = ("evals", "user_data")

log = get_logger(__name__)


def create_job(state: ApiState, project_id: str, actor: Actor, creation: Creation, request: CreateJob) -> Job:
    """Insert the job, and ring once it is committed; or find the one that an earlier try of the request has created. Raises BadRequest
    or ModelNotFound naming the field."""
    try:
        return _create_job(state, project_id, actor, creation, request)
    except AlreadyCreated as earlier:
        with state.database.reading() as session:
            return session.get_one(Job, earlier.object_id)


def _create_job(state: ApiState, project_id: str, actor: Actor, creation: Creation, request: CreateJob) -> Job:
    settings = state.settings
    if request.integrations:
        raise BadRequest("integrations: this server has none", code="unsupported_parameter", param="integrations")
    method = resolve_method(request.method, request.hyperparameters, settings.default_method)
    if method.get("sdft", {}).get("sampler") == "vllm" and settings.inference != "vllm":
        message = "method.sdft.sampler: there is no vLLM here; leave it out, or have the operator set SDFT_INFERENCE=vllm (`sdft up --inference vllm`)"
        raise BadRequest(message, code="unsupported_parameter", param="method.sdft.sampler")
    with state.database.transaction() as session:
        refuse_repetition(session, creation)
        _refuse_too_many(session, project_id, settings.project_max_unfinished_jobs)
        base_model, parent_model = _resolve_model(session, settings, project_id, request.model)
        if settings.inference == "vllm":
            _refuse_unservable_rank(session, settings.vllm_max_lora_rank, parent_model, method, request)
        _check_file(session, project_id, request.training_file, "training_file", settings.min_training_examples)
        if request.validation_file is not None:
            _check_file(session, project_id, request.validation_file, "validation_file", 1)
        if (retention_file := method.get("sdft", {}).get("retention_file")) is not None:
            questions = _file_of_purpose(session, project_id, retention_file, RETENTION_PARAM, RETENTION_PURPOSES)
            if questions.size_bytes > MAX_RETENTION_BYTES:
                message = f"{RETENTION_PARAM}: the file has {questions.size_bytes:,} bytes; at most {MAX_RETENTION_BYTES:,} are read"
                raise BadRequest(message, code="invalid_value", param=RETENTION_PARAM)
        job = transitions.create(
            session,
            project_id=project_id,
            model=request.model,
            base_model=base_model,
            parent_model=parent_model,
            training_file_id=request.training_file,
            validation_file_id=request.validation_file,
            method=method,
            suffix=request.suffix,
            seed=secrets.randbelow(LARGEST_SEED + 1) if request.seed is None else request.seed,
            metadata=request.metadata,
            origin={"request_id": actor.request_id, "trace_parent": current_trace_parent()},
        )
        record(session, actor, "fine_tuning.job.created", project_id=project_id, object_id=job.id)
        record_creation(session, creation, job.id, job_object(job, None))
    log.info("job_created", job_id=job.id)
    state.doorbell.ring()
    return job


def _refuse_too_many(session: Session, project_id: str, most: int) -> None:
    unfinished = select(func.count()).where(Job.project_id == project_id, Job.status.in_(UNFINISHED_STATUSES))
    if most and (session.scalar(unfinished) or 0) >= most:
        raise BadRequest(f"this project has {most:,} jobs that have not ended; wait or cancel some first", code="too_many_unfinished_jobs")


def _resolve_model(session: Session, settings: Settings, project_id: str, name: str) -> tuple[str, str | None]:
    """The base model to train, and the tuned model to continue from, if any."""
    if settings.base_model(name) is not None:
        return name, None
    servable = select(Model).where(Model.id == name, Model.project_id == project_id, Model.status == "servable")
    parent = session.scalar(servable.with_for_update(read=True))  # so that it can't be deleted before the job is there
    if parent is None:
        known = ", ".join(entry.id for entry in settings.base_models)
        raise ModelNotFound(f"The model {name!r} does not exist. Base models here: {known}.", param="model")
    base = settings.base_model(parent.base_model)
    if base is None:
        raise ModelNotFound(f"The model {name!r} was trained from {parent.base_model!r}, which this server no longer has.", param="model")
    proved = parent.attestation or {}
    if not base.is_base_of(made_from_of(proved.get("base_source"), proved.get("base_revision"))):
        said = f"The model {name!r} was trained from another {parent.base_model!r} than this server has under that name now."
        raise ModelNotFound(said, param="model")
    return parent.base_model, parent.id


def _refuse_unservable_rank(session: Session, largest: int, parent_model: str | None, method: dict[str, Any], request: CreateJob) -> None:
    """The adapter's rank is the parent's where the job continues a model, whatever was asked for; a vLLM takes none above `largest`."""
    rank, where = method[method["type"]]["hyperparameters"]["lora_rank"], f"method.{method['type']}.hyperparameters.lora_rank"
    param = "hyperparameters.lora_rank" if request.hyperparameters else where
    message = f"{param}: at most {largest} on this server (SDFT_VLLM_MAX_LORA_RANK), not {rank}"
    if parent_model is not None:
        trained_by = select(Job.resolved_hyperparameters).join(Model, Model.job_id == Job.id).where(Model.id == parent_model)
        rank, param = (session.scalar(trained_by) or {}).get("lora_rank", 0), "model"
        message = f"model: the rank of its adapter is {rank}, and this server serves at most {largest} (SDFT_VLLM_MAX_LORA_RANK)"
    if rank > largest:
        raise BadRequest(message, code="invalid_value", param=param)


def _check_file(session: Session, project_id: str, file_id: str, param: str, fewest_examples: int) -> None:
    file = _file_of_purpose(session, project_id, file_id, param, ("fine-tune",))
    examples = file.example_count or 0
    if examples < fewest_examples:
        message = f"{param}: the file has {examples} examples; at least {fewest_examples} are needed"
        raise BadRequest(message, code="invalid_n_examples", param=param)


def _file_of_purpose(session: Session, project_id: str, file_id: str, param: str, purposes: tuple[str, ...]) -> File:
    file = session.scalar(files_of(project_id).where(File.id == file_id).with_for_update(read=True))
    if file is None:
        raise BadRequest(f"{param}: there is no file with the id {quoted(file_id)}", code="file_not_found", param=param)
    if file.purpose not in purposes:
        message = f"{param}: the file's purpose is {file.purpose!r}; upload it with the purpose {' or '.join(purposes)}"
        raise BadRequest(message, code="invalid_file_purpose", param=param)
    return file
