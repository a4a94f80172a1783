"""Fill the run directory of an attempt: configuration, data, the parent's adapter, the checkpoint to resume from."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import select

from core.archives import fetch_directory
from core.logging import get_logger
from core.settings import Settings
from core.storage import ObjectDamaged
from core.tables.files import File
from core.tables.jobs import Checkpoint, Job, JobMetrics
from core.tables.models import Model
from core.tables.projects import Project
from sdft_engine.contract.config import TrainingConfig, VllmSampler
from sdft_engine.contract.dataset import DatasetProblem
from sdft_engine.contract.hyperparameters import ResolvedSdft, ResolvedSupervised, SdftHyperparameters
from sdft_engine.contract.probes import PARAM as RETENTION_PARAM
from sdft_engine.contract.run_directory import RunDirectory, write_atomically
from worker.base_models import PreparedBaseModel, load_base_model, require_base_of
from worker.dataset_files import measured_training_rows, measured_validation_rows, read_lines, retention_file_id, teacher_view, wire_hyperparameters
from worker.engine_process import SAMPLER_KEY
from worker.failures import JobRejected
from worker.held_lease import HeldLease
from worker.resources import Resources
from worker.rollout_adapters import rollout_adapters_of

log = get_logger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """What the supervisor needs to know of the job. `trained_tokens` are those of the steps up to `resume_step`, as far as they
    were measured: for the progress alone, the run's result has the exact number."""

    job: Job
    project_name: str
    resume_step: int
    trained_tokens: int


def prepare_run(resources: Resources, lease: HeldLease, run: RunDirectory) -> PreparedRun:
    """Raises JobRejected, BaseModelError, ObjectDamaged, LeaseLost, or StopRequested."""
    with resources.database.reading() as session:
        job = session.get_one(Job, lease.claim.job_id)
        project = session.get_one(Project, job.project_id)
        parent = session.get(Model, job.parent_model) if job.parent_model else None
        training_file = session.get(File, job.training_file_id)
        validation_file = session.get(File, job.validation_file_id) if job.validation_file_id else None
        retention_file = session.get(File, file_id) if (file_id := retention_file_id(job)) else None
    base_model = load_base_model(resources.settings, job.base_model, lease.check_wanted)
    config = _config(resources, job, base_model, lease.claim.attempt)
    write_atomically(run.config_path, config.model_dump_json(indent=1).encode())
    dropped, validation_dropped = _dropped_lines(resources, lease, job, base_model, training_file, validation_file)
    _write_rows(run.train_path, read_lines(resources.storage, training_file, "training_file"), dropped, lease)
    if job.validation_file_id:
        _write_rows(run.validation_path, read_lines(resources.storage, validation_file, "validation_file"), validation_dropped, lease)
    if retention_file_id(job):
        _write_rows(run.retention_path, read_lines(resources.storage, retention_file, RETENTION_PARAM), set(), lease)
    if job.parent_model:
        _fetch_parent(resources, lease, parent, base_model, run)
    resume_step = _fetch_checkpoint(resources, lease, run)
    return PreparedRun(job, project.name, resume_step, _trained_tokens(resources, job.id, resume_step))


def discard_bulk(run: RunDirectory) -> None:
    """Remove what an attempt that is over needs no more: it is in storage, and the next attempt fetches it anew. Logs, metrics
    and rollouts stay."""
    for directory in (run.checkpoints_dir, run.resume_dir, run.parent_adapter_dir, run.final_dir):
        shutil.rmtree(directory, ignore_errors=True)
    for data in (run.train_path, run.validation_path, run.retention_path):  # users may have deleted the files that these are copies of
        data.unlink(missing_ok=True)
    for scratch in run.path.glob(".*"):
        shutil.rmtree(scratch, ignore_errors=True) if scratch.is_dir() else scratch.unlink(missing_ok=True)


def _config(resources: Resources, job: Job, base_model: PreparedBaseModel, attempt: int) -> TrainingConfig:
    method = job.method["type"]
    resolved = job.resolved_hyperparameters
    return TrainingConfig(
        method=method,
        base_model=job.base_model,
        base_model_dir=base_model.directory,
        seed=job.seed,
        sdft=ResolvedSdft.model_validate(resolved) if method == "sdft" else None,
        supervised=ResolvedSupervised.model_validate(resolved) if method == "supervised" else None,
        teacher_template=teacher_view(job).template,
        reasoning=teacher_view(job).reasoning,
        device=resources.settings.device,
        dtype=resources.settings.dtype,
        threads=resources.settings.trainer_threads,
        gradient_checkpointing=resources.settings.gradient_checkpointing,
        tokens_per_pass=resources.settings.tokens_per_pass,
        sampler=_sampler(resources, job, attempt),
        retention=_when_retention_is_measured(resources.settings, job),
    )


def sampler_key(settings: Settings, job: Job) -> dict[str, str]:
    """The environment variable with the inference server's key, for a trainer that samples there and for no other."""
    if settings.inference_api_key is None or job.method.get("sdft", {}).get("sampler") != "vllm":
        return {}
    return {SAMPLER_KEY: settings.inference_api_key.get_secret_value()}


def _sampler(resources: Resources, job: Job, attempt: int) -> VllmSampler | None:
    """The first inference server that answers, where the job wants its rollouts from vLLM."""
    if job.method.get("sdft", {}).get("sampler") != "vllm":
        return None
    clients = resources.inference.clients
    client = next((client for client in clients if client.healthy()), clients[0])
    return VllmSampler(
        url=client.url,
        adapters_dir=resources.settings.served_adapters_dir,
        upload=resources.settings.inference_adapters == "upload",
        name_prefix=f"{rollout_adapters_of(job.id)}{attempt}",
        api_key_env=SAMPLER_KEY if resources.settings.inference_api_key else None,
        tolerance=resources.settings.attestation_tolerance,
    )


def _when_retention_is_measured(settings: Settings, job: Job) -> Literal["off", "end", "checkpoints"]:
    """As the server is set, but a file of one's own is always asked."""
    return "end" if settings.retention_probes == "off" and retention_file_id(job) else settings.retention_probes


def _dropped_lines(
    resources: Resources, lease: HeldLease, job: Job, base_model: PreparedBaseModel, training_file: File | None, validation_file: File | None
) -> tuple[set[int], set[int]]:
    """Lines of both files that validation left out. Counted again: the answer is the same, and it needs no column."""
    wire = wire_hyperparameters(job)
    if not isinstance(wire, SdftHyperparameters) or wire.over_length != "drop":
        return set(), set()
    lines = read_lines(resources.storage, training_file, "training_file")
    _, fitting = measured_training_rows(job, lines, resources.settings, base_model, lease.check_wanted)
    if not job.validation_file_id:
        return _lines(fitting.too_long), set()
    lines = read_lines(resources.storage, validation_file, "validation_file")
    _, validation_fitting = measured_validation_rows(lines, resources.settings, base_model, lease.check_wanted)
    return _lines(fitting.too_long), _lines(validation_fitting.too_long)


def _lines(problems: list[DatasetProblem]) -> set[int]:
    return {problem.line for problem in problems}


def _write_rows(path: Path, lines: Iterable[bytes], dropped: set[int], lease: HeldLease) -> None:
    """Copy the usable lines as they are, so that the trainer reads what was validated; the others become empty, so that a
    line has the number here that it has in the user's file."""
    with path.open("wb") as file:
        for number, line in enumerate(lines, start=1):
            lease.check_wanted()
            file.write(b"\n" if number in dropped else line + b"\n")


def _fetch_parent(resources: Resources, lease: HeldLease, parent: Model | None, base_model: PreparedBaseModel, run: RunDirectory) -> None:
    try:
        if parent is None or parent.status == "deleted":
            raise FileNotFoundError
        fetch_directory(resources.storage, parent.storage_key, parent.archive_sha256, run.parent_adapter_dir, lease.check_wanted)
    except FileNotFoundError as error:
        raise JobRejected("the model to continue from does not exist any more", code="model_not_found", param="model") from error
    require_base_of(run.parent_adapter_dir, base_model.entry, parent.id)


def _fetch_checkpoint(resources: Resources, lease: HeldLease, run: RunDirectory) -> int:
    """Unpack the newest checkpoint that is whole into `resume/`. Returns its step, 0 where the run starts afresh."""
    states = select(Checkpoint.step, Checkpoint.storage_key, Checkpoint.sha256).where(
        Checkpoint.job_id == lease.claim.job_id, Checkpoint.storage_key.is_not(None)
    )
    with resources.database.reading() as session:
        newest_first = session.execute(states.order_by(Checkpoint.step.desc())).all()
    for (step, key, sha256), earlier in zip(newest_first, (*newest_first[1:], None), strict=False):
        lease.check_wanted()
        try:
            fetch_directory(resources.storage, str(key), sha256, run.resume_dir, lease.check_wanted)
        except (ObjectDamaged, FileNotFoundError) as error:
            log.error("checkpoint_damaged", step=step, error=str(error))
            _report_damage(lease, step, None if earlier is None else earlier.step)
            continue
        return int(step)
    return 0


def _report_damage(lease: HeldLease, step: int, earlier_step: int | None) -> None:
    instead = f"the one of step {earlier_step} is tried" if earlier_step is not None else "there is none before it, so training starts from the beginning"
    lease.warn(f"The checkpoint of step {step} is damaged or gone; {instead}", {"step": step})


def _trained_tokens(resources: Resources, job_id: str, step: int) -> int:
    if step == 0:
        return 0
    with resources.database.reading() as session:
        rows = session.scalars(select(JobMetrics.metrics).where(JobMetrics.job_id == job_id, JobMetrics.step <= step))
        return sum(int(metrics["trained_tokens"]) for metrics in rows)
