"""Leases: how long they hold, what the reads of the poll see, and that a job let go of is clean."""

from collections.abc import Callable

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.database import Database, database_now
from core.jobs import leases, transitions
from core.jobs.leases import Claim, LeaseLost
from core.tables.jobs import Job
from tests.rows import add_job, add_project, get_job

EXPIRED = -1.0


@pytest.fixture
def project_id(database: Database) -> str:
    return add_project(database)


@pytest.fixture
def queued(database: Database, project_id: str) -> str:
    return add_job(database, project_id)


def train(database: Database, lease_seconds: float = 60) -> Claim:
    with database.transaction() as session:
        claim = transitions.claim_for_training(session, lease_seconds)
    assert claim is not None
    return claim


def requeue(database: Database, claim: Claim) -> None:
    with database.transaction() as session:
        transitions.requeue(session, claim, "the worker restarts")


def seen(database: Database, question: Callable[[Session], bool]) -> bool:
    with database.reading() as session:
        return question(session)


def test_renewal_extends_the_lease_from_now(database: Database, queued: str) -> None:
    claim = train(database, lease_seconds=5)
    with database.transaction() as session:
        assert leases.renew_lease(session, claim, 100) is None
    with database.reading() as session:
        left = session.scalar(select(Job.lease_until - database_now()).where(Job.id == queued))
    assert left is not None
    assert 90 < left <= 100


def test_renewal_tells_of_a_requested_cancellation(database: Database, queued: str) -> None:
    claim = train(database)
    with database.transaction() as session:
        assert transitions.request_cancellation(session, queued)
    with database.transaction() as session:
        assert leases.renew_lease(session, claim, 60) == "cancel"


def test_a_claim_holds_until_another_has_the_job(database: Database, queued: str) -> None:
    first = train(database)
    with database.transaction() as session:
        leases.assert_held(session, first)
    requeue(database, first)
    second = train(database)
    with pytest.raises(LeaseLost), database.transaction() as session:
        leases.assert_held(session, first)
    with database.transaction() as session:
        leases.assert_held(session, second)


def test_token_and_time_of_a_lease_go_together(database: Database, queued: str) -> None:
    claim = train(database)
    requeue(database, claim)
    job = get_job(database, queued)
    assert (job.lease_token, job.lease_until, job.phase) == (None, None, None)
    with database.transaction() as session:  # a clean row accepts the next claim
        session.execute(update(Job).where(Job.id == queued).values(seed=2))
    assert train(database).attempt == 2


def test_only_leases_that_are_over_have_expired(database: Database, queued: str) -> None:
    assert not seen(database, leases.lease_has_expired)
    claim = train(database, EXPIRED)
    assert seen(database, leases.lease_has_expired)
    with database.transaction() as session:
        leases.renew_lease(session, claim, 60)
    assert not seen(database, leases.lease_has_expired)
