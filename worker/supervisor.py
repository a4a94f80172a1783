"""One attempt of one job: prepare its run directory, start the trainer, keep the lease, carry its output into rows, and
end it as its result says. The job is never left held by nobody, and no process of the trainer outlives this function."""

import math
import os
import shutil
import time

from pydantic import ValidationError
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session
from structlog.contextvars import bound_contextvars

from core.durable_files import is_disk_full
from core.errors import StorageUnavailable, Unavailable
from core.jobs.leases import Claim, LeaseLost
from core.jobs.transitions import Progress, fail, finish_cancellation, record_progress, requeue, requeue_after_crash
from core.logging import get_logger
from core.tables.jobs import Checkpoint, Job
from sdft_engine.contract.errors import CheckpointDamaged
from sdft_engine.contract.machine_clock import machine_seconds
from sdft_engine.contract.run_directory import EXIT_LEASE_EXPIRED, Control, RunDirectory, StopReason, TrainingResult
from worker.checkpoint_import import CheckpointImport
from worker.devices import DeviceGroup
from worker.failures import describe_failure
from worker.held_lease import HeldLease, StopRequested
from worker.measurements import attempts_started, count_end, trainer_crashes
from worker.metrics_import import ProgressImport
from worker.publisher import publish
from worker.resources import Resources
from worker.rollout_adapters import forget_rollout_adapters
from worker.run_preparation import PreparedRun, discard_bulk, prepare_run, sampler_key
from worker.storage_outages import through_outages
from worker.stored_objects import delete_unreferenced
from worker.trainer_process import TrainerProcess, last_log_lines

WATCH_SECONDS = 0.2
IMPORT_SECONDS = 0.5
GRACE_SECONDS: dict[StopReason, float] = {"cancel": 60, "requeue": 20, "pause": math.inf}
"""How long a trainer may take to reach a step boundary before it is killed. A worker that ends has 30 seconds in all; a pause has no
hurry, and what it would cost to kill the trainer is what it promises to keep."""

DEPLOY_MESSAGE = "The worker was stopped, as in a deploy; the job goes back to the queue and continues from its last checkpoint"
STORAGE_MESSAGE = "The object storage could not be reached for long; the job goes back to the queue and continues from its last checkpoint"
TAKEN_BACK_MESSAGE = "The pause was taken back; the job goes back to the queue and continues from its last checkpoint"
UNREACHABLE_MESSAGE = "The database could not be reached; the job goes back to the queue and continues from its last checkpoint"

log = get_logger(__name__)


def train(resources: Resources, claim: Claim, claimed_at: float, group: DeviceGroup) -> None:
    """Train a claimed job on these devices to its end, or hand it back. The boundary: nothing but a kill leaves the job held."""
    run = RunDirectory(resources.settings.runs_dir / claim.job_id / f"attempt-{claim.attempt}")
    with bound_contextvars(job_id=claim.job_id, attempt=claim.attempt):
        attempts_started.inc()
        try:
            with HeldLease(resources, claim, claimed_at) as lease:
                settled = _attempt_or_give_up(resources, lease, run, group)
            count_end(resources, claim, settled=settled)
        finally:
            discard_bulk(run)
            forget_rollout_adapters(resources, claim.job_id, claim.attempt)


def _attempt_or_give_up(resources: Resources, lease: HeldLease, run: RunDirectory, group: DeviceGroup) -> bool:
    """Returns False where the lease was lost before the job was let go of."""
    log.info("attempt_started", devices=group.devices)
    settled = False
    try:
        _settle_attempt(resources, lease, run, group)
        settled = True
    except LeaseLost as lost:
        log.warning("attempt_abandoned", reason=str(lost))
    log.info("attempt_ended")
    return settled


def _settle_attempt(resources: Resources, lease: HeldLease, run: RunDirectory, group: DeviceGroup) -> None:
    """Raises LeaseLost."""
    try:
        _attempt(resources, lease, run, group)
    except LeaseLost:
        raise
    except Exception as error:
        _give_up(lease, error)


def _give_up(lease: HeldLease, error: Exception) -> None:
    """End the job for an exception: back to the queue where it is no fault of the job's, else failed. Raises LeaseLost."""
    if isinstance(error, StopRequested):
        message = DEPLOY_MESSAGE if error.reason == "requeue" else TAKEN_BACK_MESSAGE
        lease.settle(lambda session: requeue(session, lease.claim, message))
    elif isinstance(error, StorageUnavailable):
        lease.settle(lambda session: requeue(session, lease.claim, STORAGE_MESSAGE, level="warn"))
    elif isinstance(error, Unavailable):
        lease.settle(lambda session: requeue(session, lease.claim, UNREACHABLE_MESSAGE, level="warn"))
    else:
        described = describe_failure(error)
        lease.settle(lambda session: fail(session, lease.claim, described))


def _attempt(resources: Resources, lease: HeldLease, run: RunDirectory, group: DeviceGroup) -> None:
    _empty_directory(run)
    prepared = through_outages(lease, lambda: prepare_run(resources, lease, run))
    lease.report_to(lambda lease: run.write_control(Control(lease_deadline=lease.deadline, supervisor_pid=os.getpid(), stop=lease.stop)))
    lease.write(lambda session: record_progress(session, lease.claim, Progress(phase="starting", step=prepared.resume_step)))
    progress = ProgressImport(run, lease, prepared)
    checkpoints = CheckpointImport(resources, run, lease, prepared)
    variables = sampler_key(resources.settings, prepared.job) | group.environment()
    with TrainerProcess(group.command(resources.trainer_command), run, resources.settings, variables) as trainer:
        asked = _watch(trainer, lease, progress, checkpoints)
    log.info("trainer_ended", how=trainer.describe_exit())
    if trainer.exit_status == EXIT_LEASE_EXPIRED:
        lease.check()
        if lease.untold is not None and is_disk_full(lease.untold):  # the lease is good, and the trainer could not be told
            raise lease.untold
    progress.import_rest()
    through_outages(lease, checkpoints.import_new, lease.check_in_time)
    _conclude(resources, lease, run, prepared, trainer, asked)


def _empty_directory(run: RunDirectory) -> None:
    for leftover in run.path.parent.glob("attempt-*"):  # of attempts whose worker was killed
        discard_bulk(RunDirectory(leftover))
    shutil.rmtree(run.path, ignore_errors=True)
    run.path.mkdir(parents=True)


def _watch(trainer: TrainerProcess, lease: HeldLease, progress: ProgressImport, checkpoints: CheckpointImport) -> StopReason | None:
    """Until the trainer ends, or has to be ended: carry what it writes into rows about twice a second. Returns what it was last asked for,
    which may be taken back at any moment. Raises LeaseLost."""
    next_import = 0.0
    stop: StopReason | None = None
    while not trainer.exited():
        lease.check()
        stop, asked_at = lease.stop, lease.stop_asked_at
        if stop is not None and asked_at is not None and machine_seconds() - asked_at > GRACE_SECONDS[stop]:
            log.warning("trainer_did_not_stop", asked=stop)
            return stop
        if time.monotonic() >= next_import:
            if progress.import_new():
                checkpoints.import_if_possible()
            next_import = time.monotonic() + IMPORT_SECONDS
        time.sleep(WATCH_SECONDS)
    return stop


def _conclude(resources: Resources, lease: HeldLease, run: RunDirectory, prepared: PreparedRun, trainer: TrainerProcess, asked: StopReason | None) -> None:
    """End the attempt as the trainer's result says; without one it crashed, unless it was `asked` to stop. One that is handed back
    is paused instead where that is asked for."""
    result = _read_result(run)
    stop = lease.stop or asked
    claim, lost_leases = lease.claim, resources.settings.max_lost_leases
    handed_back = DEPLOY_MESSAGE if resources.stopping.is_set() else TAKEN_BACK_MESSAGE
    if stop == "cancel":
        lease.settle(lambda session: finish_cancellation(session, claim))
    elif result is None and stop is not None:
        lease.settle(lambda session: requeue(session, claim, handed_back))
    elif result is None:
        trainer_crashes.inc()
        crash = f"The trainer ended without a result ({trainer.describe_exit()})"
        lease.settle(lambda session: _charge(session, claim, crash, last_log_lines(run), lost_leases))
    elif result.outcome == "succeeded":
        through_outages(lease, lambda: publish(resources, lease, run, prepared, result), lease.check_in_time)
    elif result.outcome == "stopped":
        lease.settle(lambda session: requeue(session, claim, handed_back))
    else:
        _conclude_failure(resources, lease, prepared, result)


def _conclude_failure(resources: Resources, lease: HeldLease, prepared: PreparedRun, result: TrainingResult) -> None:
    claim = lease.claim
    error = result.error or {"code": "engine_error", "message": "the trainer failed without saying why", "param": None}
    if error["code"] != CheckpointDamaged.code or not prepared.resume_step:
        lease.settle(lambda session: fail(session, claim, error))
        return
    step = prepared.resume_step
    keys: list[str] = []

    def forget_checkpoint(session: Session) -> None:
        refused = delete(Checkpoint).where(Checkpoint.job_id == claim.job_id, Checkpoint.step == step)
        keys[:] = [key for key in session.scalars(refused.returning(Checkpoint.storage_key)) if key is not None]
        with_state = select(func.max(Checkpoint.step)).where(Checkpoint.job_id == claim.job_id, Checkpoint.storage_key.is_not(None))
        earlier = session.scalar(with_state.where(Checkpoint.step < step))
        instead = "starts from the beginning, as there is none before it" if earlier is None else f"tries the one of step {earlier}"
        message = f"The checkpoint of step {step} can't be used ({error['message']}); any further attempt {instead}"
        requeue_after_crash(session, claim, message, resources.settings.max_lost_leases)

    lease.settle(forget_checkpoint)
    delete_unreferenced(resources.database, resources.storage, keys)


def _read_result(run: RunDirectory) -> TrainingResult | None:
    try:
        return run.read_result()
    except ValidationError as error:
        log.error("result_unreadable", error=str(error))
        return None


def _charge(session: Session, claim: Claim, crash: str, said: str, max_lost_leases: int) -> None:
    losses = session.scalar(select(Job.lost_leases).where(Job.id == claim.job_id)) or 0
    report = crash if losses + 1 >= max_lost_leases else f"{crash}; attempt {claim.attempt + 1} follows"
    requeue_after_crash(session, claim, f"{report}. The last lines of its log:\n{said}" if said else report, max_lost_leases)
