"""What becomes of a job whose holder is not heard of any more. A lease of -1 second has expired as it begins."""

import pytest

from core.database import Database
from core.jobs import leases, transitions
from core.jobs.leases import Claim, LeaseLost
from core.jobs.transitions import Progress
from core.tables.jobs import JobEvent
from tests.rows import add_job, add_project, assert_sound, get_job, messages_of

EXPIRED = -1.0


@pytest.fixture
def project_id(database: Database) -> str:
    return add_project(database)


def claim(database: Database, lease_seconds: float) -> Claim:
    with database.transaction() as session:
        taken = transitions.claim_for_validation(session, lease_seconds) or transitions.claim_for_training(session, lease_seconds)
    assert taken is not None
    return taken


def release(database: Database) -> list[str]:
    with database.transaction() as session:
        return transitions.release_expired_leases(session, max_lost_leases=3)


def test_living_leases_and_free_jobs_are_left_alone(database: Database, project_id: str) -> None:
    held, free = add_job(database, project_id, created_at=1.0), add_job(database, project_id, created_at=2.0)
    claim(database, 60)
    assert release(database) == []
    assert [get_job(database, job_id).status for job_id in (held, free)] == ["running", "queued"]


def test_renewed_lease_does_not_expire(database: Database, project_id: str) -> None:
    job_id = add_job(database, project_id)
    taken = claim(database, EXPIRED)
    with database.transaction() as session:
        leases.renew_lease(session, taken, 60)
    assert release(database) == []
    assert get_job(database, job_id).lease_token == taken.lease_token


@pytest.mark.parametrize(("status", "back_to"), [("queued", "queued"), ("validating_files", "validating_files")])
def test_lost_job_goes_back_to_where_it_was_claimed(database: Database, project_id: str, status: str, back_to: str) -> None:
    job_id = add_job(database, project_id, status)
    stale = claim(database, EXPIRED)
    with database.transaction() as session:
        transitions.record_progress(session, stale, Progress(phase="training", estimated_finish_at=1e9, step=5))
    assert release(database) == [job_id]
    assert release(database) == []
    job = get_job(database, job_id)
    assert (job.status, job.lost_leases, job.lease_token, job.phase, job.estimated_finish_at) == (back_to, 1, None, None, None)
    with database.reading() as session:
        assert [event.level for event in session.query(JobEvent).filter_by(job_id=job_id)] == ["warn"]
    with pytest.raises(LeaseLost), database.transaction() as session:
        leases.renew_lease(session, stale, 60)
    assert claim(database, 60).job_id == job_id


def test_lost_job_with_a_requested_cancellation_is_cancelled(database: Database, project_id: str) -> None:
    job_id = add_job(database, project_id)
    claim(database, EXPIRED)
    with database.transaction() as session:
        transitions.request_cancellation(session, job_id)
    assert release(database) == [job_id]
    assert get_job(database, job_id).status == "cancelled"
    assert_sound(database, job_id)


def test_third_loss_fails_the_job_as_worker_lost(database: Database, project_id: str) -> None:
    job_id = add_job(database, project_id)
    for losses in (1, 2):
        claim(database, EXPIRED)
        release(database)
        assert (get_job(database, job_id).status, get_job(database, job_id).lost_leases) == ("queued", losses)
    claim(database, EXPIRED)
    assert release(database) == [job_id]
    job = get_job(database, job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert "3 times" in job.error["message"]
    assert messages_of(database, job_id)[-1].startswith("The job failed: the worker running this job was lost")
    assert_sound(database, job_id)


def test_losses_of_validation_do_not_count_against_training(database: Database, project_id: str) -> None:
    job_id = add_job(database, project_id, "validating_files")
    for _ in range(2):
        claim(database, EXPIRED)
        release(database)
    taken = claim(database, 60)
    with database.transaction() as session:
        transitions.finish_validation(session, taken, {}, 10)
    claim(database, EXPIRED)
    release(database)
    assert (get_job(database, job_id).status, get_job(database, job_id).lost_leases) == ("queued", 1)
