"""From a finished run to a model: adapter → storage → inference server → verified → rows, with the job's success.

All rows appear in the one transaction that ends the job, so a published model always belongs to a succeeded job, and an
attempt that lost its lease on the way leaves nothing.
"""

from dataclasses import dataclass

from sqlalchemy.orm import Session
from tenacity import Retrying, retry_if_exception_type, sleep_using_event, stop_after_attempt, stop_when_event_set, wait_exponential

from core.errors import InferenceFailed, InferenceUnavailable
from core.jobs.events import append_event
from core.jobs.transitions import Progress, record_progress, succeed
from core.logging import get_logger
from core.served_adapters import remove_from_servers
from core.tables.files import File
from core.tables.models import Model
from sdft_engine.contract import sealed_directory
from sdft_engine.contract.run_directory import RunDirectory, TrainingResult
from sdft_engine.contract.served_attestation import Verdict
from worker.adapter_archives import store_adapter
from worker.comparison import prove_on_servers
from worker.held_lease import HeldLease
from worker.resources import Resources
from worker.result_file import store_result_file
from worker.run_preparation import PreparedRun
from worker.stored_objects import delete_unreferenced
from worker.trained_models import new_trained_model
from worker.verification import NOT_VERIFIABLE_NOW, not_servable

VERIFICATION_ATTEMPTS = 5

log = get_logger(__name__)


@dataclass(frozen=True)
class Publication:
    """What is added when the job succeeds. `reason` says why the model is not servable; None: it is."""

    model: Model
    result_file: File
    reason: str | None


def publish(resources: Resources, lease: HeldLease, run: RunDirectory, prepared: PreparedRun, result: TrainingResult) -> None:
    """Ends with the job succeeded. Raises LeaseLost, StopRequested, CheckpointDamaged, ObjectDamaged, StorageFull or StorageUnavailable; then nothing
    is left behind, and it may be called again."""
    lease.write(lambda session: record_progress(session, lease.claim, Progress(phase="publishing")))
    sealed_directory.verify(run.final_dir)
    model = new_trained_model(prepared, step=None)
    keys = [model.storage_key]
    try:
        store_adapter(resources.storage, model, run.final_dir, run.path, lease.check_in_time)
        result_file = store_result_file(resources.database, resources.storage, model.project_id, model.job_id)
        keys.append(result_file.storage_key)
        reason = _verify_patiently(resources, lease, model)
        publication = Publication(model, result_file, reason)
        lease.settle(lambda session: _finish(session, lease, publication, result))
    finally:
        if model.storage_key in delete_unreferenced(resources.database, resources.storage, keys):
            remove_from_servers(model, resources.settings.served_adapters_dir, resources.inference)
    log.info("model_published", model=model.id, status=model.status, reason=reason)


def _verify_patiently(resources: Resources, lease: HeldLease, model: Model) -> str | None:
    """Set the model's status and record. Returns why it isn't servable, None where it is.

    A server that can't be reached is asked again a few times, not when this worker is to end: the model then stays
    unverified, and some worker's verification thread takes it up.
    """

    def ask() -> Verdict:
        lease.check()
        return prove_on_servers(resources, model)

    retrying = Retrying(
        retry=retry_if_exception_type((InferenceUnavailable, InferenceFailed)),
        stop=stop_after_attempt(VERIFICATION_ATTEMPTS) | stop_when_event_set(resources.stopping),
        wait=wait_exponential(multiplier=0.5, max=8),
        sleep=sleep_using_event(resources.stopping),
        reraise=True,
    )
    try:
        verdict = retrying(ask)
    except NOT_VERIFIABLE_NOW as error:
        return f"it could not be verified yet ({error}); this is tried again"
    model.attestation = verdict.record
    model.status = "unverified" if verdict.reason else "servable"
    if verdict.reason:
        remove_from_servers(model, resources.settings.served_adapters_dir, resources.inference)
    return verdict.reason


def _finish(session: Session, lease: HeldLease, publication: Publication, result: TrainingResult) -> None:
    """`succeed` is the fence: where it raises, nothing of this is kept. May run again after the database was away, so the
    session gets copies of the rows."""
    model, result_file = publication.model, publication.result_file
    append_event(session, lease.claim.job_id, f"New fine-tuned model created: {model.id}", data={"model": model.id})
    if publication.reason is not None:
        append_event(session, lease.claim.job_id, not_servable(model.id, publication.reason), level="warn", data=model.attestation)
    session.merge(model)
    session.merge(result_file)
    succeed(
        session,
        lease.claim,
        fine_tuned_model=model.id,
        result_file_id=result_file.id,
        final_step=result.final_step,
        total_steps=result.total_steps,
        trained_tokens=result.trained_tokens,
    )
