"""Claims, retries and the end of deliveries, on SQLite and Postgres. Time passes by moving due times into the past."""

import threading
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import select, update

from core.database import Database, database_now, unix_now
from core.jobs.announcements import announce
from core.tables.webhooks import WebhookDelivery, WebhookEndpoint
from core.webhooks.deliveries import (
    GIVE_UP_SECONDS,
    KEEP_SECONDS,
    DeliveryClaim,
    claim_delivery,
    delete_old_deliveries,
    delivery_is_due,
    disable_endpoint,
    record_delivered,
    record_failure,
    record_gone,
)
from core.webhooks.events import FAILED, SUCCEEDED
from core.webhooks.signing import new_secret
from tests.rows import add_endpoint, add_job, add_project, deliveries_of, get_endpoint


@pytest.fixture
def project_id(database: Database) -> str:
    return add_project(database)


def add_delivery(database: Database, project_id: str, *, event_type: str = SUCCEEDED) -> None:
    """To every endpoint of the project."""
    job_id = add_job(database, project_id)
    with database.transaction() as session:
        announce(session, job_id, event_type)


def claim(database: Database, lease_seconds: float = 60) -> DeliveryClaim | None:
    with database.transaction() as session:
        return claim_delivery(session, lease_seconds)


def must_claim(database: Database, lease_seconds: float = 60) -> DeliveryClaim:
    found = claim(database, lease_seconds)
    assert found is not None
    return found


def fail(database: Database, held: DeliveryClaim, reason: str = "the endpoint answered 500") -> float | None:
    with database.transaction() as session:
        return record_failure(session, held, reason, 500)


def change(database: Database, **columns: Any) -> None:
    with database.transaction() as session:
        session.execute(update(WebhookDelivery).values(**columns))


def test_claim_holds_all_that_sending_takes(database: Database, project_id: str) -> None:
    endpoint_id = add_endpoint(database, project_id, "https://hooks.example.com/a")
    assert claim(database) is None
    add_delivery(database, project_id)
    with database.reading() as session:
        assert delivery_is_due(session)
    held = must_claim(database)
    (row,) = deliveries_of(database, endpoint_id)
    assert (held.delivery_id, held.endpoint_id, held.attempt, held.event_type) == (row.id, endpoint_id, 1, SUCCEEDED)
    assert (held.url, held.secrets, held.body) == ("https://hooks.example.com/a", (get_endpoint(database, endpoint_id).secret,), row.body)
    assert get_endpoint(database, endpoint_id).secret not in repr(held)
    assert claim(database) is None
    with database.reading() as session:
        assert not delivery_is_due(session)


def test_delivered(database: Database, project_id: str) -> None:
    endpoint_id = add_endpoint(database, project_id)
    add_delivery(database, project_id)
    held = must_claim(database)
    with database.transaction() as session:
        assert record_delivered(session, held, 204)
    (row,) = deliveries_of(database, endpoint_id)
    assert (row.last_status, row.next_attempt_at, row.lease_token, row.lease_until, row.failed_at) == (204, None, None, None, None)
    assert row.delivered_at is not None
    assert claim(database) is None


def test_retries_back_off_for_a_day(database: Database, project_id: str) -> None:
    """As they would happen if every attempt were made when it is due."""
    endpoint_id = add_endpoint(database, project_id)
    add_delivery(database, project_id)
    passed, delays = 0.0, []
    while True:
        delay = fail(database, must_claim(database))
        if delay is None:
            break
        (row,) = deliveries_of(database, endpoint_id)
        assert row.next_attempt_at is not None
        assert row.next_attempt_at == pytest.approx(now(database) + delay, abs=2)
        assert claim(database) is None
        delays.append(delay)
        passed += delay
        change(database, next_attempt_at=database_now(), give_up_at=WebhookDelivery.give_up_at - delay)
    assert delays[:7] == [5, 30, 120, 600, 1800, 3600, 7200]
    assert set(delays[7:]) == {7200}
    assert 22 * 3600 < passed <= GIVE_UP_SECONDS < passed + 7200
    (row,) = deliveries_of(database, endpoint_id)
    assert (row.attempts, row.last_error, row.last_status, row.next_attempt_at) == (len(delays) + 1, "the endpoint answered 500", 500, None)
    assert row.failed_at is not None
    assert claim(database) is None


def now(database: Database) -> float:
    with database.reading() as session:
        value: float = session.execute(select(database_now())).scalar_one()
    return value


def test_success_after_failures(database: Database, project_id: str) -> None:
    endpoint_id = add_endpoint(database, project_id)
    add_delivery(database, project_id)
    assert fail(database, must_claim(database)) == 5
    change(database, next_attempt_at=database_now())
    held = must_claim(database)
    assert held.attempt == 2
    with database.transaction() as session:
        record_delivered(session, held, 200)
    (row,) = deliveries_of(database, endpoint_id)
    assert (row.last_error, row.failed_at, row.attempts) == (None, None, 2)


def test_first_attempt_is_made_however_late(database: Database, project_id: str) -> None:
    """After all workers were away for longer than a day."""
    add_endpoint(database, project_id)
    add_delivery(database, project_id)
    change(database, next_attempt_at=1.0, give_up_at=2.0)
    assert fail(database, must_claim(database)) is None


def test_lease_that_ran_out_passes_on(database: Database, project_id: str) -> None:
    endpoint_id = add_endpoint(database, project_id)
    add_delivery(database, project_id)
    lost = must_claim(database, lease_seconds=-1)
    held = must_claim(database)
    assert (held.delivery_id, held.attempt) == (lost.delivery_id, 2)
    with database.transaction() as session:
        assert not record_delivered(session, lost, 200)
    assert fail(database, lost) is None
    (row,) = deliveries_of(database, endpoint_id)
    assert (row.lease_token, row.delivered_at, row.last_error) == (held.lease_token, None, None)


def test_one_endpoint_is_sent_one_at_a_time(database: Database, project_id: str) -> None:
    """So one that hangs delays nobody else's."""
    slow = add_endpoint(database, project_id)
    for _ in range(3):
        add_delivery(database, project_id)
    quick = add_endpoint(database, project_id)
    add_delivery(database, project_id, event_type=FAILED)
    assert [must_claim(database).endpoint_id, must_claim(database).endpoint_id, claim(database)] == [slow, quick, None]
    change(database, lease_until=1.0, next_attempt_at=1.0)
    assert must_claim(database).endpoint_id == slow


def test_many_claimers_get_each_delivery_once(database: Database, project_id: str) -> None:
    endpoints = [add_endpoint(database, project_id) for _ in range(6)]
    for _ in range(5):
        add_delivery(database, project_id)
    claims: list[DeliveryClaim] = []
    started = threading.Barrier(8)

    def deliver() -> None:
        started.wait(30)
        idle = 0
        while idle < 20:
            held = claim(database)
            if held is None:
                idle += 1
                threading.Event().wait(0.01)
                continue
            idle = 0
            claims.append(held)
            with database.transaction() as session:
                assert record_delivered(session, held, 200)

    threads = [threading.Thread(target=deliver) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(Counter(held.delivery_id for held in claims).values()) == {1}
    assert Counter(held.endpoint_id for held in claims) == dict.fromkeys(endpoints, 5)


def test_both_secrets_sign_while_one_is_replaced(database: Database, project_id: str) -> None:
    old, new = new_secret(), new_secret()
    add_endpoint(database, project_id, secret=new, previous_secret=old, previous_secret_until=unix_now() + 60)
    add_delivery(database, project_id)
    assert must_claim(database).secrets == (new, old)
    with database.transaction() as session:
        session.execute(update(WebhookEndpoint).values(previous_secret_until=unix_now() - 60))
    change(database, lease_until=1.0, next_attempt_at=1.0)
    assert must_claim(database).secrets == (new,)


def test_endpoint_that_is_gone_is_disabled(database: Database, project_id: str) -> None:
    endpoint_id, other = add_endpoint(database, project_id), add_endpoint(database, project_id)
    for _ in range(3):
        add_delivery(database, project_id)
    held = must_claim(database)
    assert held.endpoint_id == endpoint_id
    with database.transaction() as session:
        record_gone(session, held, "the endpoint answered 410", 410)
    rows = deliveries_of(database, endpoint_id)
    assert [(row.next_attempt_at, row.lease_token, row.last_error) for row in rows] == [(None, None, "the endpoint answered 410")] * 3
    assert all(row.failed_at for row in rows)
    assert rows[0].last_status == 410
    assert get_endpoint(database, endpoint_id).disabled_reason == "the endpoint answered 410"
    assert get_endpoint(database, other).disabled_at is None
    add_delivery(database, project_id)
    assert [len(deliveries_of(database, each)) for each in (endpoint_id, other)] == [3, 4]


def test_old_url_that_is_gone_disables_nothing(database: Database, project_id: str) -> None:
    endpoint_id = add_endpoint(database, project_id)
    add_delivery(database, project_id)
    held = must_claim(database)
    with database.transaction() as session:
        session.execute(update(WebhookEndpoint).values(url="https://new.example.com/"))
    with database.transaction() as session:
        record_gone(session, held, "the endpoint answered 410", 410)
    assert get_endpoint(database, endpoint_id).disabled_at is None
    (row,) = deliveries_of(database, endpoint_id)
    assert row.next_attempt_at is not None


def test_disabling_twice_keeps_the_first_reason(database: Database, project_id: str) -> None:
    endpoint_id = add_endpoint(database, project_id)
    for reason in ("first", "second"):
        with database.transaction() as session:
            disable_endpoint(session, endpoint_id, reason)
    assert get_endpoint(database, endpoint_id).disabled_reason == "first"


def test_a_delivery_that_nobody_settles_waits_behind_the_others_and_fails_in_time(database: Database, project_id: str) -> None:
    """Whatever it is that ends its attempts without a word."""
    endpoint_id = add_endpoint(database, project_id)
    for _ in range(2):
        add_delivery(database, project_id)
    first = must_claim(database, lease_seconds=0)
    second = must_claim(database, lease_seconds=0)
    assert second.delivery_id != first.delivery_id
    change(database, give_up_at=unix_now() - 1)
    assert claim(database) is None
    rows = deliveries_of(database, endpoint_id)
    assert [row.failed_at is not None for row in rows] == [True, True]
    assert {row.last_error for row in rows} == {"no worker brought an attempt to its end"}


def test_what_was_over_long_ago_is_forgotten(database: Database, project_id: str) -> None:
    endpoint_id = add_endpoint(database, project_id)
    for _ in range(4):
        add_delivery(database, project_id)
    old, pending, young, another = deliveries_of(database, endpoint_id)
    long_ago = unix_now() - KEEP_SECONDS - 60
    with database.transaction() as session:
        for row, columns in (
            (old, {"created_at": long_ago, "next_attempt_at": None, "delivered_at": long_ago}),
            (pending, {"created_at": long_ago}),
            (young, {"next_attempt_at": None, "delivered_at": unix_now()}),
            (another, {"created_at": long_ago, "next_attempt_at": None, "failed_at": long_ago}),
        ):
            session.execute(update(WebhookDelivery).where(WebhookDelivery.id == row.id).values(**columns))
    deleted = []
    for _ in range(3):
        with database.transaction() as session:
            deleted.append(delete_old_deliveries(session, 1))
    assert deleted == [1, 1, 0]
    assert {row.id for row in deliveries_of(database, endpoint_id)} == {pending.id, young.id}


def test_a_project_with_many_deliveries_does_not_go_before_everybody(database: Database) -> None:
    """The next claim is of the project to which the fewest are being sent, whoever has waited longer."""
    many, few = add_project(database, "many"), add_project(database, "few")
    for _ in range(3):
        add_endpoint(database, many)
    add_delivery(database, many)
    endpoint = add_endpoint(database, few)
    add_delivery(database, few)
    with database.transaction() as session:
        claims = [claim_delivery(session, 60) for _ in range(4)]
    assert [claim is not None and claim.endpoint_id == endpoint for claim in claims] == [False, True, False, False]
