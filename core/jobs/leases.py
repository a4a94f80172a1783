"""Leases: who holds a job, and the fence that keeps everybody else's writes out.

A job is held by a lease: a random token and a time on the database's clock. Whoever holds it passes the token to every
later change; a change whose token is no longer the row's raises LeaseLost, and its transaction rolls back, so that a
stale attempt can't write anything. What a lease is taken for, and how it ends, stands in core.jobs.transitions.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, select, update
from sqlalchemy.orm import Session

from core.database import database_now
from core.ids import new_token
from core.tables.jobs import UNFINISHED_STATUSES, Job

EXPIRED = and_(Job.lease_until < database_now(), Job.status.in_(UNFINISHED_STATUSES))
"""The condition on a job whose holder has not been heard of."""


class LeaseLost(Exception):
    """The job is no longer held under this token: stop, and write nothing more."""


@dataclass(frozen=True)
class Claim:
    """A lease on a job."""

    job_id: str
    lease_token: str
    attempt: int


def claimable(status: str) -> Select[str]:
    """The ids of the jobs of this status that nobody holds, and that nobody wants stopped."""
    return select(Job.id).where(Job.status == status, Job.lease_token.is_(None), Job.stop_requested.is_(None))


def take_lease(session: Session, candidates: Select[str], status: str, lease_seconds: float, changes: dict[str, Any]) -> Claim | None:
    """Hold the first of `candidates`, claimable jobs of this status in an order, that no other claim is taking at this moment, with
    `changes` of its row. Returns None when there is none.

    For the claims of core.jobs.transitions."""
    token = new_token()
    first = candidates.limit(1).with_for_update(of=Job, skip_locked=True)
    statement = (
        update(Job)
        .where(Job.id == first.scalar_subquery(), Job.status == status, Job.lease_token.is_(None))
        .values(lease_token=token, lease_until=database_now() + lease_seconds, **changes)
        .returning(Job.id, Job.attempt)
        .execution_options(synchronize_session=False)
    )
    row = session.execute(statement).one_or_none()
    return None if row is None else Claim(row.id, token, row.attempt)


def renew_lease(session: Session, claim: Claim, lease_seconds: float) -> str | None:
    """Extend the lease from now. Returns the stop that was requested ("cancel" or "pause"), if any. Raises LeaseLost."""
    requested: str | None = update_held(session, claim, lease_until=database_now() + lease_seconds).stop_requested
    return requested


def assert_held(session: Session, claim: Claim) -> None:
    """Raise LeaseLost unless the claim holds; locks the row, so that what follows in this transaction is fenced."""
    update_held(session, claim, lease_token=claim.lease_token)


def update_held(session: Session, claim: Claim, **columns: Any) -> Any:
    """The fence: update the row only while it is held under the claim's token. Returns its stop_requested and lost_leases.

    For core.jobs alone: whatever others may change has a function with a name."""
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


def lease_has_expired(session: Session) -> bool:
    """Whether `release_expired_leases` would find any job; only reads, so that looking often costs no write lock."""
    return session.scalar(select(Job.id).where(EXPIRED).limit(1)) is not None
