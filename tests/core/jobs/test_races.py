"""Many threads, each with its own connection, on the same rows."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.database import Database
from core.jobs import leases, transitions
from core.jobs.leases import Claim, LeaseLost
from tests.rows import TERMINAL_MESSAGES, add_job, add_project, assert_sound, get_job, messages_of, succeed_job

RACES = 1000


@pytest.fixture
def project_id(database: Database) -> str:
    return add_project(database)


def side_by_side(*actions: Callable[[], None]) -> None:
    """Run the actions in threads that start together; an exception in any of them is raised here."""
    barrier = threading.Barrier(len(actions))

    def start_together(action: Callable[[], None]) -> None:
        barrier.wait(30)
        action()

    with ThreadPoolExecutor(len(actions)) as pool:
        for result in [pool.submit(start_together, action) for action in actions]:
            result.result()


def test_each_job_is_claimed_once(database: Database, project_id: str) -> None:
    """And nobody goes away empty-handed while there are jobs, however many grab for the oldest."""
    jobs = {add_job(database, project_id, created_at=float(position)) for position in range(60)}
    claims: list[Claim | None] = []

    def claim_three() -> None:
        for _ in range(3):
            with database.transaction() as session:
                claim = transitions.claim_for_training(session, 60)
            claims.append(claim)

    side_by_side(*[claim_three] * 20)
    assert Counter(claim and claim.job_id for claim in claims) == Counter(jobs)
    assert len({claim.lease_token for claim in claims if claim}) == 60
    assert all(get_job(database, job_id).attempt == 1 for job_id in jobs)


def test_expired_leases_are_released_once(database: Database, project_id: str) -> None:
    jobs = {add_job(database, project_id) for _ in range(20)}
    with database.transaction() as session:
        while transitions.claim_for_training(session, -1):
            pass
    released: list[str] = []

    def release() -> None:
        with database.transaction() as session:
            freed = transitions.release_expired_leases(session, 3)
        released.extend(freed)

    side_by_side(*[release] * 8)
    release()  # those that were locked by another releaser at the time were skipped, not lost
    assert Counter(released) == Counter(jobs)
    assert all(get_job(database, job_id).lost_leases == 1 for job_id in jobs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cancel_racing_completion_gives_one_ending(database: Database, project_id: str) -> None:
    endings: Counter[str] = Counter()
    for _ in range(RACES):
        job_id = add_job(database, project_id)
        claim = _claim(database)

        def complete(claim: Claim = claim) -> None:
            with database.transaction() as session:
                stop = leases.renew_lease(session, claim, 60)
            with database.transaction() as session:
                (transitions.finish_cancellation if stop else succeed_job)(session, claim)

        side_by_side(complete, lambda job_id=job_id: _cancel(database, job_id))  # type: ignore[misc]
        assert_sound(database, job_id)
        assert messages_of(database, job_id)[-1].startswith(TERMINAL_MESSAGES), "a cancellation was accepted after the end"
        endings[get_job(database, job_id).status] += 1
    assert set(endings) <= {"succeeded", "cancelled"}
    assert sum(endings.values()) == RACES


@pytest.mark.slow
def test_cancel_racing_a_requeue_never_leaves_a_stuck_job(database: Database, project_id: str) -> None:
    for _ in range(RACES // 5):
        job_id = add_job(database, project_id)
        claim = _claim(database)

        def requeue(claim: Claim = claim) -> None:
            with database.transaction() as session:
                transitions.requeue(session, claim, "the worker restarts")

        side_by_side(requeue, lambda job_id=job_id: _cancel(database, job_id))  # type: ignore[misc]
        assert_sound(database, job_id)
        assert get_job(database, job_id).status == "cancelled"


@pytest.mark.slow
def test_late_holder_racing_the_release_of_its_lease(database: Database, project_id: str) -> None:
    """Either the holder's result or the requeue counts, never both."""
    for _ in range(RACES // 10):
        job_id = add_job(database, project_id)
        with database.transaction() as session:
            claim = transitions.claim_for_training(session, -1)
        assert claim is not None
        outcome: list[str] = []

        def succeed(claim: Claim = claim, outcome: list[str] = outcome) -> None:
            try:
                with database.transaction() as session:
                    succeed_job(session, claim)
                outcome.append("succeeded")
            except LeaseLost:
                outcome.append("queued")

        def release() -> None:
            with database.transaction() as session:
                transitions.release_expired_leases(session, 3)

        side_by_side(succeed, release)
        assert [get_job(database, job_id).status] == outcome
        assert_sound(database, job_id)
        _cancel(database, job_id)


def _claim(database: Database) -> Claim:
    with database.transaction() as session:
        claim = transitions.claim_for_training(session, 60)
    assert claim is not None
    return claim


def _cancel(database: Database, job_id: str) -> None:
    with database.transaction() as session:
        transitions.request_cancellation(session, job_id)
