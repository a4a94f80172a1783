"""Every change of a job's status, one named function each, as guarded updates.

          create
            │
    validating_files ──finish_validation──► queued ──claim_for_training──► running ──succeed──► succeeded
            │                                 ▲                              │
            │                                 └────requeue / expired lease───┤
            └──────────fail / cancel──────────┬──────────────────────────────┘
                                       failed, cancelled

    whatever has not ended ──pause──► paused ──resume──► validating_files or queued
                                         └─────cancel──► cancelled

A held job is changed only under its lease (core.jobs.leases): with a claim that is no longer good, every function here
raises LeaseLost. None of them commits: the caller's `transaction()` does.
"""

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import case, select, update
from sqlalchemy.orm import Session

from core.database import database_now, unix_now
from core.ids import new_id
from core.jobs.announcements import announce
from core.jobs.events import Level, append_event
from core.jobs.leases import EXPIRED, Claim, take_lease, update_held
from core.jobs.queue import keep_claims_apart, next_queued, next_to_validate
from core.storable import without_nul
from core.tables.jobs import TERMINAL_STATUSES, Job
from core.tables.projects import Project
from core.webhooks.events import CANCELLED, FAILED, SUCCEEDED

RELEASED: dict[str, Any] = {"lease_token": None, "lease_until": None, "phase": None, "estimated_finish_at": None}
"""Columns of a job that nobody holds any more."""
PAUSED = "The job is paused; resume it to go on"


@dataclass(frozen=True)
class Progress:
    """How far a running job is. None leaves a column as it is."""

    phase: str | None = None
    step: int | None = None
    total_steps: int | None = None
    trained_tokens: int | None = None
    estimated_finish_at: float | None = None
    resolved_hyperparameters: dict[str, Any] | None = None


def create(
    session: Session,
    *,
    project_id: str,
    model: str,
    base_model: str,
    parent_model: str | None,
    training_file_id: str,
    validation_file_id: str | None,
    method: dict[str, Any],
    suffix: str | None,
    seed: int,
    metadata: dict[str, Any] | None,
    origin: dict[str, Any] | None = None,
) -> Job:
    """A new job, validating_files: the next worker that looks finds it. See the columns of Job for the arguments."""
    job = Job(
        id=new_id("ftjob"),
        project_id=project_id,
        status="validating_files",
        model=model,
        base_model=base_model,
        parent_model=parent_model,
        training_file_id=training_file_id,
        validation_file_id=validation_file_id,
        method=method,
        suffix=suffix,
        seed=seed,
        job_metadata=metadata,
        origin=origin,
        created_at=unix_now(),
        attempt=0,
        lost_leases=0,
    )
    session.add(job)
    session.flush()  # the event refers to the job's row
    append_event(session, job.id, f"Created fine-tuning job: {job.id}")
    return job


def claim_for_validation(session: Session, lease_seconds: float) -> Claim | None:
    """Take the job whose files are validated next (core.jobs.queue). Returns None when there is none."""
    return take_lease(session, next_to_validate(), "validating_files", lease_seconds, {})


def claim_for_training(session: Session, lease_seconds: float, max_running: int | None = None) -> Claim | None:
    """Take the queued job that is next (core.jobs.queue): it becomes running, and an attempt is counted. `max_running`: jobs of one
    project that run at a time, where the project has no limit of its own. Returns None when none may start."""
    keep_claims_apart(session)
    changes = {"status": "running", "attempt": Job.attempt + 1, "started_at": case((Job.started_at.is_(None), unix_now()), else_=Job.started_at)}
    claim = take_lease(session, next_queued(max_running), "queued", lease_seconds, changes)
    if claim is not None:
        project_id = select(Job.project_id).where(Job.id == claim.job_id).scalar_subquery()
        session.execute(update(Project).where(Project.id == project_id).values(last_claimed_at=database_now()).execution_options(synchronize_session=False))
    return claim


def record_progress(session: Session, claim: Claim, progress: Progress) -> None:
    """No change of status, but of the columns that are given."""
    update_held(session, claim, **{name: value for name, value in asdict(progress).items() if value is not None})


def finish_validation(session: Session, claim: Claim, resolved_hyperparameters: dict[str, Any], total_steps: int) -> None:
    """validating_files → queued, when every row was counted and fits; cancelled or paused where that was asked meanwhile."""
    if _stopped_instead(session, claim):
        return
    update_held(session, claim, status="queued", resolved_hyperparameters=resolved_hyperparameters, total_steps=total_steps, lost_leases=0, **RELEASED)
    append_event(session, claim.job_id, "Files validated, moving job to queued state")


def release_validation(session: Session, claim: Claim) -> None:
    """Stop validating at the worker's wish (a deploy): the job waits for another worker. Charges nothing."""
    if not _stopped_instead(session, claim):
        update_held(session, claim, **RELEASED)


def forgive_losses(session: Session, claim: Claim) -> None:
    """No change of status: the job has come further than any attempt before, so that what was lost until now no longer counts. The limit
    is there for jobs that take their workers with them and get nowhere."""
    update_held(session, claim, lost_leases=0)


def requeue(session: Session, claim: Claim, reason: str, level: Level = "info") -> None:
    """running → queued at the supervisor's wish (a deploy); cancelled or paused where that was asked meanwhile. Charges nothing."""
    if _stopped_instead(session, claim):
        return
    update_held(session, claim, status="queued", **RELEASED)
    append_event(session, claim.job_id, reason, level=level)


def requeue_after_crash(session: Session, claim: Claim, reason: str, max_lost_leases: int) -> None:
    """running → queued after a trainer died without a result; failed when that happened too often without progress between; cancelled or paused where
    that was asked meanwhile."""
    if _stopped_instead(session, claim):
        return
    row = update_held(session, claim, lost_leases=Job.lost_leases + 1)
    if row.lost_leases >= max_lost_leases:
        fail(session, claim, {"code": "trainer_crashed", "message": f"{reason} (tried {row.lost_leases} times)", "param": None})
    else:
        requeue(session, claim, reason, level="warn")


def succeed(session: Session, claim: Claim, *, fine_tuned_model: str, result_file_id: str, final_step: int, total_steps: int, trained_tokens: int) -> None:
    """running → succeeded, once the adapter is in storage and registered."""
    update_held(
        session,
        claim,
        status="succeeded",
        finished_at=unix_now(),
        fine_tuned_model=fine_tuned_model,
        result_file_id=result_file_id,
        step=final_step,
        total_steps=total_steps,
        trained_tokens=trained_tokens,
        **RELEASED,
    )
    append_event(session, claim.job_id, "The job has successfully completed")
    announce(session, claim.job_id, SUCCEEDED)


def fail(session: Session, claim: Claim, error: dict[str, Any]) -> None:
    """Any held status → failed. `error` is the job's {code, message, param}."""
    error = without_nul(error)
    update_held(session, claim, status="failed", finished_at=unix_now(), error=error, **RELEASED)
    append_event(session, claim.job_id, f"The job failed: {error['message']}", level="error", data={"error": error})
    announce(session, claim.job_id, FAILED)


def finish_pause(session: Session, claim: Claim) -> None:
    """Held and not ended → paused, when the holder has stopped at a step boundary, with a checkpoint where it trained."""
    update_held(session, claim, status="paused", stop_requested=None, **RELEASED)
    append_event(session, claim.job_id, PAUSED)


def finish_cancellation(session: Session, claim: Claim) -> None:
    """Any held status → cancelled, when the holder has stopped at a step boundary."""
    update_held(session, claim, status="cancelled", finished_at=unix_now(), **RELEASED)
    append_event(session, claim.job_id, "The job was cancelled")
    announce(session, claim.job_id, CANCELLED)


def request_cancellation(session: Session, job_id: str) -> bool:
    """Cancel a job: at once where nobody holds it, else by asking its holder. Returns False on a finished or unknown job."""
    row = _locked(session, job_id)
    if row is None or row.status in TERMINAL_STATUSES:
        return False
    changes: dict[str, Any] = {"stop_requested": "cancel"}
    if row.lease_token is None:
        changes |= {"status": "cancelled", "finished_at": unix_now(), **RELEASED}
        append_event(session, job_id, "The job was cancelled")
        announce(session, job_id, CANCELLED)
    elif row.stop_requested != "cancel":
        append_event(session, job_id, "Cancellation requested; the job stops at its next step")
    _change(session, job_id, changes)
    return True


def request_pause(session: Session, job_id: str) -> bool:
    """Pause a job: at once where nobody holds it, else by asking its holder. Does nothing where it is paused, or about to be paused or
    cancelled. Returns False on a finished or unknown job."""
    row = _locked(session, job_id)
    if row is None or row.status in TERMINAL_STATUSES:
        return False
    if row.status == "paused" or row.stop_requested is not None:
        return True
    if row.lease_token is None:
        _change(session, job_id, {"status": "paused", **RELEASED})
        append_event(session, job_id, PAUSED)
    else:
        _change(session, job_id, {"stop_requested": "pause"})
        append_event(session, job_id, "Pause requested; the job stops at its next step")
    return True


def resume(session: Session, job_id: str) -> bool:
    """paused → where a worker finds it: queued once its files are validated, else validating_files. One that was only asked to pause
    goes on. Does nothing to others. Returns False on a finished or unknown job."""
    row = _locked(session, job_id)
    if row is None or row.status in TERMINAL_STATUSES:
        return False
    if row.status == "paused":
        _change(session, job_id, {"status": "validating_files" if row.resolved_hyperparameters is None else "queued"})
        append_event(session, job_id, "Resumed; the job goes on from its last checkpoint" if row.step else "Resumed")
    elif row.stop_requested == "pause":
        _change(session, job_id, {"stop_requested": None})
        append_event(session, job_id, "The requested pause was taken back")
    return True


def release_expired_leases(session: Session, max_lost_leases: int) -> list[str]:
    """Free every job whose holder has not been heard of: cancelled or paused if that was asked, failed as `worker_lost` after too
    many losses without progress between, else back to where another attempt finds it. Returns the ids of the freed jobs."""
    columns = (Job.id, Job.lease_token, Job.attempt, Job.status, Job.stop_requested, Job.lost_leases)
    expired = session.execute(select(*columns).where(EXPIRED).with_for_update(skip_locked=True)).all()
    for row in expired:
        claim = Claim(row.id, row.lease_token, row.attempt)  # the lost holder's
        losses = row.lost_leases + 1
        if row.stop_requested == "cancel":
            finish_cancellation(session, claim)
        elif row.stop_requested == "pause":
            finish_pause(session, claim)
        elif losses >= max_lost_leases:
            message = f"the worker running this job was lost {losses} times without a new checkpoint; see the worker's log"
            fail(session, claim, {"code": "worker_lost", "message": message, "param": None})
        else:
            update_held(session, claim, status="queued" if row.status == "running" else row.status, lost_leases=losses, **RELEASED)
            append_event(session, row.id, "The worker running this job was lost; the job goes back to the queue", level="warn")
    return [row.id for row in expired]


def _stopped_instead(session: Session, claim: Claim) -> bool:
    """Finish a cancellation or pause that was requested while the job was held: once nobody holds it, nobody would."""
    requested = update_held(session, claim, lease_token=claim.lease_token).stop_requested
    if requested == "cancel":
        finish_cancellation(session, claim)
    elif requested == "pause":
        finish_pause(session, claim)
    return requested is not None


def _locked(session: Session, job_id: str) -> Any:
    """What decides what may be done with a job, locked: its holder may be letting go of it at this moment. None: unknown."""
    columns = (Job.status, Job.lease_token, Job.stop_requested, Job.resolved_hyperparameters, Job.step)
    return session.execute(select(*columns).where(Job.id == job_id).with_for_update()).one_or_none()


def _change(session: Session, job_id: str, columns: dict[str, Any]) -> None:
    session.execute(update(Job).where(Job.id == job_id).values(**columns).execution_options(synchronize_session=False))
