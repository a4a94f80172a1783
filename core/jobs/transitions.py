"""Every change of a job's status, one named function each, as guarded updates.

        create_job
            │
    validating_files ──finish_validation──► queued ──claim_for_training──► running ──succeed──► succeeded
            │                                 ▲                              │
            │                                 └────requeue / expired lease───┤
            └──────────fail / cancel──────────┬──────────────────────────────┘
                                       failed, cancelled

A job is held by a lease: a random token and a time on the database's clock. Whoever holds it passes the token to every
later change; a change whose token is no longer the row's raises LeaseLost, and its transaction rolls back, so that a
stale attempt can't write anything. No function here commits: the caller's `transaction()` does.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, or_, select, update
from sqlalchemy.orm import Session

from core.database import database_now, unix_now
from core.ids import new_token
from core.jobs.events import Level, append_event
from core.tables.jobs import TERMINAL_STATUSES, Job


class LeaseLost(Exception):
    """The job is no longer held under this token: stop, and write nothing more."""


@dataclass(frozen=True)
class Claim:
    """A lease on a job. `validating` says what it was claimed for: its files, or training."""

    job_id: str
    lease_token: str
    attempt: int
    validating: bool


def claim_for_validation(session: Session, lease_seconds: float) -> Claim | None:
    """Take the oldest job whose files wait to be validated. Returns None when there is none."""
    return _claim(session, "validating_files", lease_seconds, {})


def claim_for_training(session: Session, lease_seconds: float) -> Claim | None:
    """Take the oldest queued job: it becomes running, and an attempt is counted. Returns None when there is none."""
    changes = {"status": "running", "attempt": Job.attempt + 1, "started_at": case((Job.started_at.is_(None), unix_now()), else_=Job.started_at)}
    return _claim(session, "queued", lease_seconds, changes)


def _claim(session: Session, status: str, lease_seconds: float, changes: dict[str, Any]) -> Claim | None:
    token = new_token()
    oldest = (
        select(Job.id)
        .where(Job.status == status, Job.lease_token.is_(None), Job.stop_requested.is_(None))
        .order_by(Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    statement = (
        update(Job)
        .where(Job.id == oldest.scalar_subquery(), Job.status == status, Job.lease_token.is_(None))
        .values(lease_token=token, lease_until=database_now() + lease_seconds, **changes)
        .returning(Job.id, Job.attempt)
        .execution_options(synchronize_session=False)
    )
    row = session.execute(statement).one_or_none()
    return None if row is None else Claim(row.id, token, row.attempt, validating=status == "validating_files")


def renew_lease(session: Session, claim: Claim, lease_seconds: float) -> str | None:
    """Extend the lease from now. Returns the stop that was requested ("cancel"), if any. Raises LeaseLost."""
    requested: str | None = _held(session, claim, lease_until=database_now() + lease_seconds).stop_requested
    return requested


def record_progress(session: Session, claim: Claim, **columns: Any) -> None:
    """Set progress columns (step, total_steps, phase, trained_tokens, estimated_finish_at, resolved_hyperparameters)."""
    _held(session, claim, **columns)


def assert_held(session: Session, claim: Claim) -> None:
    """Raise LeaseLost unless the claim holds; locks the row, so that what follows in this transaction is fenced."""
    _held(session, claim, lease_token=claim.lease_token)


def finish_validation(session: Session, claim: Claim, resolved_hyperparameters: dict[str, Any], total_steps: int) -> None:
    """validating_files → queued, when every row was counted and fits; cancelled where that was asked meanwhile."""
    if _cancelled_instead(session, claim):
        return
    _held(
        session,
        claim,
        status="queued",
        lease_token=None,
        lease_until=None,
        resolved_hyperparameters=resolved_hyperparameters,
        total_steps=total_steps,
        lost_leases=0,
    )
    append_event(session, claim.job_id, "Files validated, moving job to queued state")


def release_validation(session: Session, claim: Claim) -> None:
    """Stop validating at the worker's wish (a deploy): the job waits for another worker. Charges nothing."""
    if not _cancelled_instead(session, claim):
        _held(session, claim, lease_token=None, lease_until=None)


def requeue(session: Session, claim: Claim, reason: str, level: Level = "info") -> None:
    """running → queued at the supervisor's wish (a deploy); cancelled where that was asked meanwhile. Charges nothing."""
    if _cancelled_instead(session, claim):
        return
    _held(session, claim, status="queued", lease_token=None, lease_until=None, phase=None, estimated_finish_at=None)
    append_event(session, claim.job_id, reason, level=level)


def requeue_after_crash(session: Session, claim: Claim, reason: str, max_lost_leases: int) -> None:
    """running → queued after a trainer died without a result; failed when that happened too often."""
    row = _held(session, claim, lost_leases=Job.lost_leases + 1)
    if row.lost_leases >= max_lost_leases:
        fail(session, claim, {"code": "trainer_crashed", "message": f"{reason} (tried {row.lost_leases} times)", "param": None})
    else:
        requeue(session, claim, reason, level="warn")


def succeed(session: Session, claim: Claim, **columns: Any) -> None:
    """running → succeeded, once the adapter is in storage and registered."""
    _finish(session, claim, "succeeded", phase=None, estimated_finish_at=None, **columns)
    append_event(session, claim.job_id, "The job has successfully completed")


def fail(session: Session, claim: Claim, error: dict[str, Any]) -> None:
    """Any held status → failed. `error` is the job's {code, message, param}."""
    _finish(session, claim, "failed", error=error, phase=None, estimated_finish_at=None)
    append_event(session, claim.job_id, f"The job failed: {error['message']}", level="error", data={"error": error})


def finish_cancellation(session: Session, claim: Claim) -> None:
    """Any held status → cancelled, when the holder has stopped at a step boundary."""
    _finish(session, claim, "cancelled", phase=None, estimated_finish_at=None)
    append_event(session, claim.job_id, "The job was cancelled")


def request_cancellation(session: Session, job_id: str) -> bool:
    """Cancel a job: at once where nobody holds it, else by asking its holder. Returns False on a finished or unknown job."""
    job = select(Job.status, Job.lease_token, Job.stop_requested).where(Job.id == job_id)
    row = session.execute(job.with_for_update()).one_or_none()  # locked: a holder may be letting go at this moment
    if row is None or row.status in TERMINAL_STATUSES:
        return False
    changes: dict[str, Any] = {"stop_requested": "cancel"}
    if row.lease_token is None:
        changes |= {"status": "cancelled", "finished_at": unix_now(), "phase": None, "estimated_finish_at": None}
        append_event(session, job_id, "The job was cancelled")
    elif row.stop_requested is None:
        append_event(session, job_id, "Cancellation requested; the job stops at its next step")
    session.execute(update(Job).where(Job.id == job_id).values(**changes).execution_options(synchronize_session=False))
    return True


def lease_has_expired(session: Session) -> bool:
    """Whether `release_expired_leases` would find any job; only reads, so that looking often costs no write lock."""
    return session.scalar(select(Job.id).where(Job.lease_until < database_now(), Job.status.not_in(TERMINAL_STATUSES)).limit(1)) is not None


def release_expired_leases(session: Session, max_lost_leases: int) -> list[str]:
    """Free every job whose holder has not been heard of: cancelled if that was asked, failed as `worker_lost` after too
    many losses, else back to where another attempt finds it. Returns the ids of the freed jobs."""
    expired = session.execute(
        select(Job.id, Job.status, Job.stop_requested, Job.lost_leases, Job.lease_token)
        .where(Job.lease_until < database_now(), Job.status.not_in(TERMINAL_STATUSES))
        .with_for_update(skip_locked=True)
    ).all()
    for row in expired:
        claim = Claim(row.id, row.lease_token, 0, validating=False)
        if row.stop_requested == "cancel":
            finish_cancellation(session, claim)
        elif row.lost_leases + 1 >= max_lost_leases:
            message = f"the worker running this job was lost {row.lost_leases + 1} times; see the worker's log"
            fail(session, claim, {"code": "worker_lost", "message": message, "param": None})
        else:
            status = "queued" if row.status == "running" else row.status
            _held(session, claim, status=status, lease_token=None, lease_until=None, lost_leases=row.lost_leases + 1, phase=None, estimated_finish_at=None)
            append_event(session, row.id, "The worker running this job was lost; the job goes back to the queue", level="warn")
    return [row.id for row in expired]


def _cancelled_instead(session: Session, claim: Claim) -> bool:
    """Finish a cancellation that was requested while the job was held: once nobody holds it, nobody would."""
    if _held(session, claim, lease_token=claim.lease_token).stop_requested != "cancel":
        return False
    finish_cancellation(session, claim)
    return True


def _finish(session: Session, claim: Claim, status: str, **columns: Any) -> None:
    _held(session, claim, status=status, lease_token=None, lease_until=None, finished_at=unix_now(), **columns)


def _held(session: Session, claim: Claim, **columns: Any) -> Any:
    """The fence: update the row only while it is held under the claim's token."""
    statement = (
        update(Job)
        .where(Job.id == claim.job_id, Job.lease_token == claim.lease_token)
        .values(**columns)
        .returning(Job.stop_requested, Job.lost_leases)
        .execution_options(synchronize_session=False)
    )
    row = session.execute(statement).one_or_none()
    if row is None:
        raise LeaseLost(f"job {claim.job_id} is no longer held by this attempt")
    return row


def waiting_for_work(session: Session) -> bool:
    """Whether any job waits for a worker, for the poll that heals lost nudges."""
    waiting = or_(Job.status == "validating_files", Job.status == "queued")
    return session.scalar(select(Job.id).where(waiting, Job.lease_token.is_(None)).limit(1)) is not None
