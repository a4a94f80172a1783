"""Every end of a job is announced once, in the transaction that ends it."""

import threading
from collections.abc import Callable

import orjson
import pytest
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from core.database import Database, database_now
from core.jobs import transitions
from core.jobs.leases import Claim
from core.tables.webhooks import WebhookDelivery, WebhookEndpoint
from core.webhooks.deliveries import disable_endpoint
from tests.rows import add_endpoint, add_job, add_project, deliveries_of, get_job, succeed_job

ERROR = {"code": "out_of_memory", "message": "no memory", "param": None}


def requeue_cancelled(session: Session, claim: Claim) -> None:
    transitions.request_cancellation(session, claim.job_id)
    transitions.requeue(session, claim, "the worker restarts")


def lose_for_good(session: Session, claim: Claim) -> None:
    transitions.release_expired_leases(session, 1)


def lose_cancelled(session: Session, claim: Claim) -> None:
    transitions.request_cancellation(session, claim.job_id)
    transitions.release_expired_leases(session, 3)


ENDINGS: dict[str, tuple[Callable[[Session, Claim], None], str]] = {
    "success": (succeed_job, "succeeded"),
    "failure": (lambda session, claim: transitions.fail(session, claim, ERROR), "failed"),
    "cancellation by its holder": (transitions.finish_cancellation, "cancelled"),
    "cancellation when it is handed back": (requeue_cancelled, "cancelled"),
    "too many crashes": (lambda session, claim: transitions.requeue_after_crash(session, claim, "died", 1), "failed"),
    "too many lost leases": (lose_for_good, "failed"),
    "a cancellation whose holder is lost": (lose_cancelled, "cancelled"),
}


def claimed_job(database: Database, project_id: str) -> Claim:
    add_job(database, project_id)
    with database.transaction() as session:
        claim = transitions.claim_for_training(session, -1)
    assert claim is not None
    return claim


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_is_announced(database: Database, ending: str) -> None:
    end, status = ENDINGS[ending]
    project_id = add_project(database)
    endpoint_id, second = add_endpoint(database, project_id), add_endpoint(database, project_id)
    claim = claimed_job(database, project_id)
    with database.transaction() as session:
        end(session, claim)
    assert get_job(database, claim.job_id).status == status
    (delivery,) = deliveries_of(database, endpoint_id)
    (other,) = deliveries_of(database, second)
    assert (delivery.event_type, delivery.attempts, delivery.lease_token) == (f"fine_tuning.job.{status}", 0, None)
    event = orjson.loads(delivery.body)
    assert (event["object"], event["type"], event["data"]) == ("event", delivery.event_type, {"id": claim.job_id})
    assert other.body == delivery.body
    assert other.id != delivery.id
    with database.reading() as session:
        now: float = session.execute(select(database_now())).scalar_one()
    assert delivery.next_attempt_at is not None
    assert delivery.next_attempt_at <= now
    assert delivery.give_up_at == pytest.approx(delivery.next_attempt_at + 24 * 3600, abs=1)


def test_cancellation_of_a_waiting_job_is_announced(database: Database) -> None:
    project_id = add_project(database)
    endpoint_id, job_id = add_endpoint(database, project_id), add_job(database, project_id)
    for _ in range(2):
        with database.transaction() as session:
            transitions.request_cancellation(session, job_id)
    assert [delivery.event_type for delivery in deliveries_of(database, endpoint_id)] == ["fine_tuning.job.cancelled"]


@pytest.mark.parametrize("end", [lambda session, claim: transitions.requeue(session, claim, "restart"), requeue_cancelled], ids=["requeue", "cancel asked"])
def test_what_is_not_committed_is_not_announced(database: Database, end: Callable[[Session, Claim], None]) -> None:
    project_id = add_project(database)
    endpoint_id = add_endpoint(database, project_id)
    claim = claimed_job(database, project_id)
    with database.transaction() as session:
        end(session, claim)
        session.rollback()
    with database.transaction() as session:
        transitions.requeue(session, claim, "a requeue is no end")
    assert deliveries_of(database, endpoint_id) == []


def test_only_those_who_asked_are_told(database: Database) -> None:
    project_id, other_project = add_project(database), add_project(database, "other")
    told = add_endpoint(database, project_id, event_types=["fine_tuning.job.failed", "fine_tuning.job.succeeded"])
    untold = [
        add_endpoint(database, project_id, event_types=["fine_tuning.job.failed"]),
        add_endpoint(database, project_id, disabled_at=1.0),
        add_endpoint(database, other_project),
    ]
    claim = claimed_job(database, project_id)
    with database.transaction() as session:
        succeed_job(session, claim)
    assert len(deliveries_of(database, told)) == 1
    assert [deliveries_of(database, endpoint_id) for endpoint_id in untold] == [[], [], []]


@pytest.mark.parametrize("way", ["deleted", "disabled"])
def test_endpoint_that_goes_while_a_job_ends(postgres_url: str, way: str) -> None:
    """Whichever commits first, the job ends, and nothing is left waiting for an endpoint that is not there to be told."""
    database = Database(postgres_url)
    project_id = add_project(database)
    for first in ("job", "endpoint"):
        endpoint_id, claim = add_endpoint(database, project_id), claimed_job(database, project_id)

        def go(session: Session, endpoint_id: str = endpoint_id) -> None:
            if way == "disabled":
                disable_endpoint(session, endpoint_id, "410")
                return
            session.execute(select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id).with_for_update())
            session.execute(delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id))
            session.execute(delete(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id))

        def end(session: Session, claim: Claim = claim) -> None:
            succeed_job(session, claim)

        changes = (end, go) if first == "job" else (go, end)
        with database.transaction() as session:
            changes[0](session)
            session.flush()
            second = threading.Thread(target=in_transaction, args=(database, changes[1]))
            second.start()
            second.join(0.3)
            assert second.is_alive()  # it waits for the first one's commit
        second.join(10)
        assert get_job(database, claim.job_id).status == "succeeded"
        with database.reading() as session:
            waiting = select(func.count()).select_from(WebhookDelivery).where(WebhookDelivery.next_attempt_at.is_not(None))
            assert session.scalar(waiting) == 0
    database.close()


def in_transaction(database: Database, change: Callable[[Session], None]) -> None:
    with database.transaction() as session:
        change(session)
