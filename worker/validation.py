"""`validating_files`: count every row's tokens with the base model's own tokenizer, settle what is automatic, queue the job.

Torch-free. The upload was checked for syntax already; it is read again here because rules and limits may have changed.
"""

from structlog.contextvars import bound_contextvars

from core.errors import Unavailable
from core.jobs.leases import Claim, LeaseLost
from core.jobs.transitions import fail, finish_validation, release_validation
from core.logging import get_logger
from core.tables.files import File
from core.tables.jobs import Job
from sdft_engine.contract.dataset import MAX_REPORTED_PROBLEMS
from sdft_engine.contract.hyperparameters import (
    DatasetStatistics,
    ResolvedSupervised,
    SdftHyperparameters,
    SupervisedHyperparameters,
    resolve_sdft,
    resolve_supervised,
    total_steps_of,
)
from sdft_engine.contract.probes import PARAM as RETENTION_PARAM
from worker.base_models import PreparedBaseModel, load_base_model
from worker.dataset_files import (
    check_retention_questions,
    measured_training_rows,
    measured_validation_rows,
    read_lines,
    require_usable,
    retention_file_id,
    teacher_view,
    wire_hyperparameters,
)
from worker.devices import DeviceGroup
from worker.failures import JobRejected, describe_failure, rows_rejected
from worker.held_lease import HeldLease, StopRequested
from worker.resources import Resources
from worker.row_lengths import FittingRows, RowLength, name_lines
from worker.storage_outages import through_outages

log = get_logger(__name__)


def validate(resources: Resources, claim: Claim, claimed_at: float, group: DeviceGroup | None = None) -> None:
    """Validate the files of a claimed job; no device is needed. The boundary: whatever happens, the job is let go of or failed."""
    with bound_contextvars(job_id=claim.job_id), HeldLease(resources, claim, claimed_at) as lease:
        log.info("validation_started")
        try:
            through_outages(lease, lambda: _validate(resources, lease))
            log.info("validation_finished")
        except LeaseLost:
            log.warning("validation_abandoned")
        except Exception as error:
            _settle(lease, error)


def _settle(lease: HeldLease, error: Exception) -> None:
    """Fail the job, or let another worker validate it where that can't help."""
    try:
        if isinstance(error, StopRequested | Unavailable):
            log.info("validation_stopped", reason=str(error))
            lease.settle(lambda session: release_validation(session, lease.claim))
        else:
            described = describe_failure(error)
            log.info("validation_failed", code=described["code"])
            lease.settle(lambda session: fail(session, lease.claim, described))
    except LeaseLost:
        log.warning("validation_abandoned")


def _validate(resources: Resources, lease: HeldLease) -> None:
    settings, job_id = resources.settings, lease.claim.job_id
    with resources.database.reading() as session:
        job = session.get_one(Job, job_id)
        training_file = session.get(File, job.training_file_id)
        validation_file = session.get(File, job.validation_file_id) if job.validation_file_id else None
        retention_file = session.get(File, file_id) if (file_id := retention_file_id(job)) else None
    base_model = load_base_model(settings, job.base_model, lease.check_wanted)
    wire = wire_hyperparameters(job)
    may_drop = isinstance(wire, SdftHyperparameters) and wire.over_length == "drop"

    lines = read_lines(resources.storage, training_file, "training_file")
    measured, fitting = measured_training_rows(job, lines, settings, base_model, lease.check_wanted)
    require_usable(measured, "training_file")
    _reject_or_report(lease, fitting, "training_file", may_drop)
    if len(fitting.rows) < settings.min_training_examples:
        needed = f"a training file needs at least {settings.min_training_examples} usable examples"
        left = f", and {len(fitting.rows)} are left without {name_lines(fitting.too_long)}" if fitting.too_long else f", this one has {len(fitting.rows)}"
        raise JobRejected(needed + left, code="invalid_n_examples", param="training_file")
    if job.validation_file_id:
        lines = read_lines(resources.storage, validation_file, "validation_file")
        measured, validation_fitting = measured_validation_rows(lines, settings, base_model, lease.check_wanted)
        require_usable(measured, "validation_file")
        _reject_or_report(lease, validation_fitting, "validation_file", may_drop)
        if not validation_fitting.rows:
            raise JobRejected("the validation file has no usable example", code="invalid_n_examples", param="validation_file")

    if retention_file_id(job):
        check_retention_questions(read_lines(resources.storage, retention_file, RETENTION_PARAM), base_model)

    resolved = _resolve(wire, fitting.rows, base_model, teacher_view(job).reasoning)
    total_steps = total_steps_of(len(fitting.rows), resolved.batch_size, resolved.n_epochs)
    lease.settle(lambda session: finish_validation(session, lease.claim, resolved.model_dump(), total_steps))
    resources.doorbell.ring()


def _reject_or_report(lease: HeldLease, fitting: FittingRows, param: str, may_drop: bool) -> None:
    """Rows that don't fit the context fail the job, or are left out where the user asked for that; never silently."""
    if not fitting.too_long:
        return
    if not may_drop:
        raise rows_rejected(fitting.too_long[:MAX_REPORTED_PROBLEMS], len(fitting.too_long), param=param)
    dropped = [problem.line for problem in fitting.too_long]
    counted = f"{len(dropped)} of {len(dropped) + len(fitting.rows)} rows of the {param.replace('_', ' ')}"
    message = f"{counted} don't fit the context and are left out: {name_lines(fitting.too_long)}"
    lease.warn(message, {"param": param, "dropped": len(dropped), "lines": dropped[:MAX_REPORTED_PROBLEMS]})


def _resolve(
    wire: SdftHyperparameters | SupervisedHyperparameters, rows: list[RowLength], base_model: PreparedBaseModel, reasoning: bool
) -> ResolvedSupervised:
    statistics = DatasetStatistics(
        rows=len(rows),
        answer_tokens=[row.answer for row in rows],
        hidden_size=base_model.hidden_size,
        longest_teacher_prompt=max(row.longest_prompt for row in rows),
        context_length=base_model.chat_format.context_length,
        reasoning=reasoning,
    )
    return resolve_sdft(wire, statistics) if isinstance(wire, SdftHyperparameters) else resolve_supervised(wire, statistics)
