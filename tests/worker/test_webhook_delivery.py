"""The worker's deliveries to real receivers: what arrives is what the stock client accepts, at every attempt."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from sqlalchemy import delete, update

from core.database import Database, database_now
from core.errors import Unavailable
from core.jobs.announcements import announce
from core.settings import Settings
from core.tables.webhooks import WebhookDelivery, WebhookEndpoint
from core.webhooks.deliveries import claim_delivery
from core.webhooks.events import SUCCEEDED
from core.webhooks.signing import new_secret
from tests.fixtures.webhook_receiver import Receiver, receiving
from tests.rows import add_endpoint, add_job, deliveries_of, get_endpoint
from tests.worker.conftest import Workshop, workshop_of
from tests.worker.test_supervisor import wait_for
from worker import webhook_delivery
from worker.webhook_delivery import Deliverer

client = OpenAI(api_key="unused", base_url="http://127.0.0.1:1")


@pytest.fixture
def workshop(worker_settings: Callable[..., Settings], database: Database, tmp_path: Path) -> Workshop:
    return workshop_of(worker_settings(webhook_allow_insecure=True), database, tmp_path)


@pytest.fixture
def running(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """The thread looks often."""
    monkeypatch.setattr(webhook_delivery, "LOOK_SECONDS", 0.02)
    thread = threading.Thread(target=Deliverer(workshop.resources).run)
    thread.start()
    yield workshop
    workshop.resources.stopping.set()
    thread.join(20)
    assert not thread.is_alive()


def tell(workshop: Workshop) -> str:
    job_id = add_job(workshop.database, workshop.project_id, "succeeded")
    with workshop.database.transaction() as session:
        announce(session, job_id, SUCCEEDED)
    return job_id


def make_due(workshop: Workshop) -> None:
    with workshop.database.transaction() as session:
        session.execute(update(WebhookDelivery).where(WebhookDelivery.next_attempt_at.is_not(None)).values(next_attempt_at=database_now()))


def the_delivery(workshop: Workshop, endpoint_id: str) -> WebhookDelivery:
    (delivery,) = deliveries_of(workshop.database, endpoint_id)
    return delivery


def deliver_next(workshop: Workshop) -> None:
    deliverer = Deliverer(workshop.resources)
    claim = deliverer._claim()
    assert claim is not None
    deliverer.deliver(claim)


def test_every_retry_is_signed_anew_under_the_same_id(running: Workshop) -> None:
    with receiving(Receiver([500, 503, 200])) as receiver:
        endpoint_id = add_endpoint(running.database, running.project_id, receiver.url)
        job_id = tell(running)
        for attempts in (1, 2, 3):
            wait_for(lambda: the_delivery(running, endpoint_id).attempts == attempts and the_delivery(running, endpoint_id).lease_token is None)  # noqa: B023
            if attempts < 3:
                time.sleep(1.1)  # a timestamp has whole seconds
                make_due(running)
    secret = get_endpoint(running.database, endpoint_id).secret
    events = [client.webhooks.unwrap(request.body, request.headers, secret=secret) for request in receiver.received]
    assert [(event.type, event.data.id) for event in events] == [(SUCCEEDED, job_id)] * 3  # type: ignore[union-attr]
    assert len({event.id for event in events}) == 1
    assert len({request.headers["webhook-id"] for request in receiver.received}) == 1
    assert len({request.headers["webhook-timestamp"] for request in receiver.received}) == 3
    assert len({request.headers["webhook-signature"] for request in receiver.received}) == 3
    delivery = the_delivery(running, endpoint_id)
    assert delivery.id == receiver.received[0].headers["webhook-id"]
    assert (delivery.delivered_at is not None, delivery.last_status) == (True, 200)


def test_old_secret_is_accepted_while_it_is_replaced(workshop: Workshop) -> None:
    old = new_secret()
    with receiving() as receiver:
        until = time.time() + 3600
        endpoint_id = add_endpoint(workshop.database, workshop.project_id, receiver.url, previous_secret=old, previous_secret_until=until)
        tell(workshop)
        deliver_next(workshop)
        with workshop.database.transaction() as session:
            session.execute(update(WebhookEndpoint).values(previous_secret_until=time.time() - 1))
        tell(workshop)
        deliver_next(workshop)
    during, after = receiver.received
    new = get_endpoint(workshop.database, endpoint_id).secret
    for request, secret in ((during, old), (during, new), (after, new)):
        client.webhooks.unwrap(request.body, request.headers, secret=secret)
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(after.body, after.headers, secret=old)


@pytest.mark.parametrize("status", [200, 204, 299])
def test_answers_that_mean_delivered(workshop: Workshop, status: int) -> None:
    with receiving(Receiver([status], body=b"")) as receiver:
        endpoint_id = add_endpoint(workshop.database, workshop.project_id, receiver.url)
        tell(workshop)
        deliver_next(workshop)
    assert the_delivery(workshop, endpoint_id).delivered_at is not None


@pytest.mark.parametrize("status", [301, 400, 401, 404, 429, 500, 503])
def test_answers_that_are_tried_again(workshop: Workshop, status: int) -> None:
    with receiving(Receiver([status])) as receiver:
        endpoint_id = add_endpoint(workshop.database, workshop.project_id, receiver.url)
        tell(workshop)
        deliver_next(workshop)
    delivery = the_delivery(workshop, endpoint_id)
    assert (delivery.delivered_at, delivery.failed_at, delivery.last_status) == (None, None, status)
    assert delivery.last_error == f"the endpoint answered {status}"
    assert delivery.next_attempt_at is not None
    assert get_endpoint(workshop.database, endpoint_id).disabled_at is None


def test_410_disables_the_endpoint(workshop: Workshop) -> None:
    with receiving(Receiver([410])) as receiver:
        endpoint_id = add_endpoint(workshop.database, workshop.project_id, receiver.url)
        tell(workshop)
        deliver_next(workshop)
    assert get_endpoint(workshop.database, endpoint_id).disabled_reason == "the endpoint answered 410"
    assert the_delivery(workshop, endpoint_id).failed_at is not None


def test_connection_that_fails_is_tried_again(workshop: Workshop) -> None:
    with receiving() as receiver:
        url = receiver.url
    endpoint_id = add_endpoint(workshop.database, workshop.project_id, url)
    tell(workshop)
    deliver_next(workshop)
    delivery = the_delivery(workshop, endpoint_id)
    assert (delivery.last_status, delivery.next_attempt_at is not None) == (None, True)
    assert "refused" in str(delivery.last_error)


def test_rules_hold_at_every_delivery(worker_settings: Callable[..., Settings], database: Database, tmp_path: Path) -> None:
    """Also for an endpoint that was created while the setting allowed it."""
    workshop = workshop_of(worker_settings(), database, tmp_path)
    with receiving() as receiver:
        endpoint_id = add_endpoint(database, workshop.project_id, receiver.url)
        tell(workshop)
        deliver_next(workshop)
    assert receiver.received == []
    assert "https" in str(the_delivery(workshop, endpoint_id).last_error)


def test_slow_endpoint_delays_its_own_deliveries_alone(running: Workshop) -> None:
    with receiving(Receiver(held=True)) as slow, receiving() as quick:
        add_endpoint(running.database, running.project_id, slow.url)
        add_endpoint(running.database, running.project_id, quick.url)
        for _ in range(5):
            tell(running)
        wait_for(lambda: len(quick.received) == 5 and len(slow.received) == 1)
        slow.released.set()
        wait_for(lambda: len(slow.received) >= 2)
        assert slow.most_at_once == 1


def test_claims_at_the_same_moment_never_take_two_of_one_endpoint(workshop: Workshop) -> None:
    for _ in range(20):
        endpoint_id = add_endpoint(workshop.database, workshop.project_id, "https://example.com/hook")
        for _ in range(6):
            tell(workshop)
        barrier = threading.Barrier(6)

        def claim(_: int, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait(20)
            with workshop.database.transaction() as session:
                return claim_delivery(session, 60) is not None

        with ThreadPoolExecutor(6) as threads:
            assert sum(threads.map(claim, range(6))) == 1
        with workshop.database.transaction() as session:
            session.execute(delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id))
            session.execute(delete(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id))


def test_several_endpoints_are_served_at_once(running: Workshop) -> None:
    with ExitStack() as stack:
        receivers = [stack.enter_context(receiving(Receiver(held=True))) for _ in range(webhook_delivery.MAX_AT_A_TIME)]
        for receiver in receivers:
            add_endpoint(running.database, running.project_id, receiver.url)
        tell(running)
        wait_for(lambda: all(receiver.received for receiver in receivers))
        for receiver in receivers:
            receiver.released.set()


def test_two_workers_send_each_event_once(running: Workshop) -> None:
    other = threading.Thread(target=Deliverer(running.resources).run)
    other.start()
    with receiving() as receiver:
        endpoint_id = add_endpoint(running.database, running.project_id, receiver.url)
        jobs = [tell(running) for _ in range(20)]
        wait_for(lambda: all(delivery.delivered_at for delivery in deliveries_of(running.database, endpoint_id)), 30)
    secret = get_endpoint(running.database, endpoint_id).secret
    told = [client.webhooks.unwrap(request.body, request.headers, secret=secret).data.id for request in receiver.received]  # type: ignore[union-attr]
    assert sorted(told) == sorted(jobs)
    running.resources.stopping.set()
    other.join(20)


def test_database_that_is_away_after_sending(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What became of a delivery is recorded when it is back, so the receiver isn't told twice."""
    real = Database.transaction
    failures: list[int] = []

    def away(self: Database) -> object:
        if receiver.received and len(failures) < 2:
            failures.append(1)
            raise Unavailable("away")
        return real(self)

    with receiving() as receiver:
        endpoint_id = add_endpoint(workshop.database, workshop.project_id, receiver.url)
        tell(workshop)
        monkeypatch.setattr(Database, "transaction", away)
        deliver_next(workshop)
    assert len(failures) == 2
    assert the_delivery(workshop, endpoint_id).delivered_at is not None


def test_no_session_is_open_while_sending(workshop: Workshop) -> None:
    with receiving(Receiver(held=True)) as receiver:
        add_endpoint(workshop.database, workshop.project_id, receiver.url)
        tell(workshop)
        thread = threading.Thread(target=deliver_next, args=(workshop,))
        thread.start()
        wait_for(lambda: bool(receiver.received))
        assert workshop.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        receiver.released.set()
        thread.join()


def test_stop_waits_for_what_is_being_sent(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_delivery, "LOOK_SECONDS", 0.02)
    thread = threading.Thread(target=Deliverer(workshop.resources).run)
    thread.start()
    with receiving(Receiver(wait_seconds=1)) as receiver:
        endpoint_id = add_endpoint(workshop.database, workshop.project_id, receiver.url)
        tell(workshop)
        tell(workshop)
        wait_for(lambda: bool(receiver.received))
        workshop.resources.stopping.set()
        thread.join(5)
    assert not thread.is_alive()
    assert len(receiver.received) == 1
    assert [delivery.delivered_at is not None for delivery in deliveries_of(workshop.database, endpoint_id)] == [True, False]


def test_an_error_that_nobody_foresaw_is_a_failed_attempt(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left unsettled it would be sent first again and again, and nothing else would reach its endpoint."""

    def break_down(*arguments: object, **options: object) -> int:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(webhook_delivery, "send", break_down)
    endpoint_id = add_endpoint(workshop.database, workshop.project_id)
    tell(workshop)
    deliver_next(workshop)
    delivery = the_delivery(workshop, endpoint_id)
    assert (delivery.attempts, delivery.lease_token, delivery.delivered_at) == (1, None, None)
    assert delivery.last_error == "sending it failed with an internal error (RuntimeError)"
    assert delivery.next_attempt_at is not None
