"""Each transition: when it may happen, what it writes, and that a stale holder writes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from core.database import Database, database_now
from core.jobs import leases, transitions
from core.jobs.events import append_event
from core.jobs.leases import Claim, LeaseLost
from core.jobs.transitions import Progress
from core.tables.jobs import TERMINAL_STATUSES, Job
from tests.rows import add_job, add_project, assert_sound, get_job, messages_of, succeed_job

ERROR = {"code": "invalid_dataset", "message": "line 3: no", "param": "training_file"}
Change = Callable[[Session, Claim], object]


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


def cancel(database: Database, job_id: str) -> bool:
    with database.transaction() as session:
        return transitions.request_cancellation(session, job_id)


def pause(database: Database, job_id: str) -> bool:
    with database.transaction() as session:
        return transitions.request_pause(session, job_id)


def resume(database: Database, job_id: str) -> bool:
    with database.transaction() as session:
        return transitions.resume(session, job_id)


def columns_of(database: Database, job_id: str) -> dict[str, Any]:
    with database.reading() as session:
        return dict(session.execute(select(Job.__table__).where(Job.id == job_id)).one()._mapping)


def seconds_left(database: Database, job_id: str) -> float:
    with database.reading() as session:
        return float(session.scalar(select(Job.lease_until - database_now()).where(Job.id == job_id)) or 0)


def test_a_new_job_waits_for_validation(database: Database, project_id: str) -> None:
    with database.transaction() as session:
        created = transitions.create(
            session,
            project_id=project_id,
            model="ft:tiny:default::1",
            base_model="tiny",
            parent_model=None,
            training_file_id="file-1",
            validation_file_id=None,
            method={"type": "sdft"},
            suffix="lamps",
            seed=7,
            metadata={"team": "a"},
        )
    job = get_job(database, created.id)
    assert (job.status, job.attempt, job.lost_leases, job.lease_token) == ("validating_files", 0, 0, None)
    assert (job.model, job.base_model, job.training_file_id, job.suffix, job.seed, job.job_metadata) == (
        "ft:tiny:default::1",
        "tiny",
        "file-1",
        "lamps",
        7,
        {"team": "a"},
    )
    assert messages_of(database, job.id) == [f"Created fine-tuning job: {job.id}"]
    with database.transaction() as session:
        claim = transitions.claim_for_validation(session, 60)
    assert claim is not None
    assert claim.job_id == job.id


def test_progress_leaves_what_it_does_not_name(database: Database, queued: str) -> None:
    claim = train(database)
    with database.transaction() as session:
        transitions.record_progress(session, claim, Progress(phase="training", step=3, total_steps=9, trained_tokens=30))
    with database.transaction() as session:
        transitions.record_progress(session, claim, Progress(phase="publishing"))
    job = get_job(database, queued)
    assert (job.phase, job.step, job.total_steps, job.trained_tokens, job.status) == ("publishing", 3, 9, 30, "running")


def test_claims_take_the_oldest_job_of_their_kind(database: Database, project_id: str) -> None:
    newer = add_job(database, project_id, created_at=20.0)
    older = add_job(database, project_id, created_at=10.0)
    unvalidated = add_job(database, project_id, "validating_files", created_at=5.0)
    with database.transaction() as session:
        validation = transitions.claim_for_validation(session, 60)
        trainings = [transitions.claim_for_training(session, 60) for _ in range(3)]
        assert transitions.claim_for_validation(session, 60) is None
    assert validation is not None
    assert validation.job_id == unvalidated
    assert [claim and (claim.job_id, claim.attempt) for claim in trainings] == [(older, 1), (newer, 1), None]
    assert get_job(database, unvalidated).status == "validating_files"


def test_claim_starts_an_attempt_and_a_lease_on_the_database_clock(database: Database, queued: str) -> None:
    claim = train(database, lease_seconds=60)
    job = get_job(database, queued)
    assert (job.status, job.attempt, job.lease_token) == ("running", 1, claim.lease_token)
    assert job.started_at is not None
    assert 50 < seconds_left(database, queued) <= 60


def test_second_attempt_keeps_the_first_start_and_gets_a_fresh_token(database: Database, queued: str) -> None:
    first = train(database)
    started_at = get_job(database, queued).started_at
    with database.transaction() as session:
        transitions.requeue(session, first, "the worker restarts")
    second = train(database)
    job = get_job(database, queued)
    assert (second.attempt, job.attempt, job.lost_leases) == (2, 2, 0)
    assert job.started_at == started_at
    assert second.lease_token != first.lease_token


def test_validation_ends_in_the_queue_with_resolved_numbers(database: Database, project_id: str) -> None:
    job_id = add_job(database, project_id, "validating_files", lost_leases=2)
    with database.transaction() as session:
        claim = transitions.claim_for_validation(session, 60)
        assert claim is not None
        transitions.finish_validation(session, claim, {"n_epochs": 3}, 42)
    job = get_job(database, job_id)
    assert (job.status, job.resolved_hyperparameters, job.total_steps, job.lost_leases) == ("queued", {"n_epochs": 3}, 42, 0)
    assert_sound(database, job_id)
    assert train(database).job_id == job_id


def test_interrupted_validation_waits_for_another_worker(database: Database, project_id: str) -> None:
    job_id = add_job(database, project_id, "validating_files")
    with database.transaction() as session:
        claim = transitions.claim_for_validation(session, 60)
        assert claim is not None
        transitions.release_validation(session, claim)
    with database.transaction() as session:
        again = transitions.claim_for_validation(session, 60)
    assert again is not None
    assert (again.job_id, get_job(database, job_id).lost_leases) == (job_id, 0)


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (succeed_job, "succeeded", "The job has successfully completed"),
        (lambda s, c: transitions.fail(s, c, ERROR), "failed", "The job failed: line 3: no"),
        (transitions.finish_cancellation, "cancelled", "The job was cancelled"),
    ],
)
def test_endings(database: Database, queued: str, change: Change, status: str, message: str) -> None:
    claim = train(database)
    with database.transaction() as session:
        transitions.record_progress(session, claim, Progress(phase="training", estimated_finish_at=1e9, step=3))
        change(session, claim)
    job = get_job(database, queued)
    assert job.status == status
    assert (job.phase, job.estimated_finish_at) == (None, None)
    assert job.error == (ERROR if status == "failed" else None)
    assert job.fine_tuned_model == ("ft:tiny:default::1" if status == "succeeded" else None)
    assert messages_of(database, queued)[-1] == message
    assert_sound(database, queued)


STALE_CHANGES: dict[str, Callable[[Session, Claim], Any]] = {
    "renew_lease": lambda s, c: leases.renew_lease(s, c, 60),
    "record_progress": lambda s, c: transitions.record_progress(s, c, Progress(step=7)),
    "assert_held": leases.assert_held,
    "finish_validation": lambda s, c: transitions.finish_validation(s, c, {}, 1),
    "release_validation": transitions.release_validation,
    "requeue": lambda s, c: transitions.requeue(s, c, "stale"),
    "requeue_after_crash": lambda s, c: transitions.requeue_after_crash(s, c, "stale", 3),
    "succeed": succeed_job,
    "fail": lambda s, c: transitions.fail(s, c, ERROR),
    "finish_cancellation": transitions.finish_cancellation,
}


@pytest.mark.parametrize("change", STALE_CHANGES.values(), ids=STALE_CHANGES)
@pytest.mark.parametrize("now", ["held by another", "finished"])
def test_stale_holder_writes_nothing(database: Database, queued: str, change: Change, now: str) -> None:
    stale = train(database)
    with database.transaction() as session:
        transitions.requeue(session, stale, "lost")
    current = train(database)
    if now == "finished":
        with database.transaction() as session:
            succeed_job(session, current)
    before, messages = columns_of(database, queued), messages_of(database, queued)

    def write_and_change() -> None:
        with database.transaction() as session:
            append_event(session, queued, "written by the stale attempt")
            change(session, stale)

    with pytest.raises(LeaseLost):
        write_and_change()
    assert columns_of(database, queued) == before
    assert messages_of(database, queued) == messages


@pytest.mark.parametrize("status", ["validating_files", "queued"])
def test_cancelling_a_job_that_nobody_holds_is_immediate(database: Database, project_id: str, status: str) -> None:
    job_id = add_job(database, project_id, status)
    assert cancel(database, job_id)
    assert get_job(database, job_id).status == "cancelled"
    assert_sound(database, job_id)
    with database.transaction() as session:
        assert transitions.claim_for_training(session, 60) is None
        assert transitions.claim_for_validation(session, 60) is None


@pytest.mark.parametrize("status", ["validating_files", "queued"])
def test_cancelling_a_held_job_asks_its_holder_once(database: Database, project_id: str, status: str) -> None:
    job_id = add_job(database, project_id, status)
    with database.transaction() as session:
        claim = transitions.claim_for_validation(session, 60) or transitions.claim_for_training(session, 60)
    assert claim is not None
    assert cancel(database, job_id)
    assert cancel(database, job_id)
    job = get_job(database, job_id)
    assert (job.stop_requested, job.lease_token) == ("cancel", claim.lease_token)
    assert messages_of(database, job_id) == ["Cancellation requested; the job stops at its next step"]
    with database.transaction() as session:
        transitions.finish_cancellation(session, claim)
    assert get_job(database, job_id).status == "cancelled"
    assert_sound(database, job_id)


@pytest.mark.parametrize("status", TERMINAL_STATUSES)
def test_finished_or_unknown_jobs_can_not_be_cancelled(database: Database, project_id: str, status: str) -> None:
    job_id = add_job(database, project_id, status)
    assert not cancel(database, job_id)
    assert not cancel(database, "ftjob-unknown")
    assert get_job(database, job_id).status == status
    assert messages_of(database, job_id) == []


@pytest.mark.parametrize(
    ("status", "change"),
    [
        ("validating_files", lambda s, c: transitions.finish_validation(s, c, {}, 1)),
        ("validating_files", transitions.release_validation),
        ("queued", lambda s, c: transitions.requeue(s, c, "the worker restarts")),
        ("queued", lambda s, c: transitions.requeue_after_crash(s, c, "died", 3)),
        ("queued", lambda s, c: transitions.requeue_after_crash(s, c, "died for the last time", 1)),
    ],
)
def test_job_with_a_requested_cancellation_neither_goes_back_to_the_queue_nor_fails(database: Database, project_id: str, status: str, change: Change) -> None:
    """In the queue nobody could claim it any more, and it would wait for ever."""
    job_id = add_job(database, project_id, status)
    with database.transaction() as session:
        claim = transitions.claim_for_validation(session, 60) or transitions.claim_for_training(session, 60)
    assert claim is not None
    cancel(database, job_id)
    with database.transaction() as session:
        change(session, claim)
    assert get_job(database, job_id).status == "cancelled"
    assert_sound(database, job_id)


def test_crashes_are_charged_and_the_third_fails_the_job(database: Database, queued: str) -> None:
    for expected in (1, 2):
        with database.transaction() as session:
            claim = transitions.claim_for_training(session, 60)
            assert claim is not None
            transitions.requeue_after_crash(session, claim, "the trainer was killed", 3)
        job = get_job(database, queued)
        assert (job.status, job.lost_leases, job.lease_token) == ("queued", expected, None)
    with database.transaction() as session:
        claim = transitions.claim_for_training(session, 60)
        assert claim is not None
        transitions.requeue_after_crash(session, claim, "the trainer was killed", 3)
    job = get_job(database, queued)
    assert job.status == "failed"
    assert job.error == {"code": "trainer_crashed", "message": "the trainer was killed (tried 3 times)", "param": None}
    assert_sound(database, queued)


@pytest.mark.parametrize(("status", "validated"), [("validating_files", None), ("queued", {"n_epochs": 1})])
def test_a_job_that_nobody_holds_is_paused_at_once_and_goes_on_where_it_was(
    database: Database, project_id: str, status: str, validated: dict[str, int] | None
) -> None:
    job_id = add_job(database, project_id, status, resolved_hyperparameters=validated)
    assert pause(database, job_id)
    assert pause(database, job_id), "asked for again it stays so"
    assert get_job(database, job_id).status == "paused"
    with database.transaction() as session:
        assert transitions.claim_for_training(session, 60) is None
        assert transitions.claim_for_validation(session, 60) is None
    assert_sound(database, job_id)
    assert resume(database, job_id)
    assert resume(database, job_id)
    assert get_job(database, job_id).status == status
    assert messages_of(database, job_id) == ["The job is paused; resume it to go on", "Resumed"]


@pytest.mark.parametrize("how", ["stopped", "deployed", "crashed", "lost"])
def test_a_held_job_is_paused_however_its_holder_lets_go(database: Database, project_id: str, how: str) -> None:
    job_id = add_job(database, project_id, step=8, resolved_hyperparameters={})
    claim = train(database, lease_seconds=-1 if how == "lost" else 60)
    assert pause(database, job_id)
    assert get_job(database, job_id).status == "running"
    with database.transaction() as session:
        if how == "stopped":
            transitions.finish_pause(session, claim)
        elif how == "deployed":
            transitions.requeue(session, claim, "the worker restarts")
        elif how == "crashed":
            transitions.requeue_after_crash(session, claim, "died", 1)
        else:
            assert transitions.release_expired_leases(session, 1) == [job_id]
    job = get_job(database, job_id)
    assert (job.status, job.stop_requested, job.lease_token, job.lost_leases) == ("paused", None, None, 0)
    assert_sound(database, job_id)
    assert resume(database, job_id)
    assert train(database).attempt == 2
    assert messages_of(database, job_id)[-1] == "Resumed; the job goes on from its last checkpoint"


def test_a_pause_that_is_taken_back_in_time_changes_nothing(database: Database, queued: str) -> None:
    claim = train(database)
    pause(database, queued)
    assert resume(database, queued)
    with database.transaction() as session:
        assert leases.renew_lease(session, claim, 60) is None
        transitions.requeue(session, claim, "it had stopped already")
    assert get_job(database, queued).status == "queued"


def test_cancelling_goes_before_pausing(database: Database, queued: str) -> None:
    claim = train(database)
    pause(database, queued)
    cancel(database, queued)
    assert pause(database, queued)
    assert resume(database, queued)
    assert get_job(database, queued).stop_requested == "cancel"
    with database.transaction() as session:
        transitions.requeue(session, claim, "the worker restarts")
    assert get_job(database, queued).status == "cancelled"
    assert_sound(database, queued)


def test_a_paused_job_can_be_cancelled(database: Database, queued: str) -> None:
    pause(database, queued)
    assert cancel(database, queued)
    assert get_job(database, queued).status == "cancelled"
    assert_sound(database, queued)


@pytest.mark.parametrize("status", TERMINAL_STATUSES)
def test_finished_or_unknown_jobs_can_not_be_paused_or_resumed(database: Database, project_id: str, status: str) -> None:
    job_id = add_job(database, project_id, status)
    for change in (pause, resume):
        assert not change(database, job_id)
        assert not change(database, "ftjob-unknown")
    assert get_job(database, job_id).status == status
    assert messages_of(database, job_id) == []


def test_one_project_s_many_jobs_are_not_validated_before_everybody_s(database: Database) -> None:
    """However long they have waited: the others' turn comes after one that is being validated, and after one that waits validated."""
    many, few = add_project(database, "many"), add_project(database, "few")
    for number in range(5):
        add_job(database, many, "validating_files", created_at=number)
    late = add_job(database, few, "validating_files", created_at=100)
    with database.transaction() as session:
        first = transitions.claim_for_validation(session, 60)
    assert first is not None
    assert first.job_id != late
    with database.transaction() as session:
        transitions.finish_validation(session, first, {}, 10)
    with database.transaction() as session:
        second = transitions.claim_for_validation(session, 60)
    assert second is not None
    assert second.job_id == late
