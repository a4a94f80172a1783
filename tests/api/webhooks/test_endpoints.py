"""Webhook endpoints through the stock client, and tests of them that arrive at a real receiver."""

import base64
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from openai import BadRequestError, InvalidWebhookSignatureError, NotFoundError, OpenAI
from sqlalchemy import select, update

from api.webhooks import service
from core.database import unix_now
from core.jobs.announcements import announce
from core.jobs.transitions import request_cancellation
from core.tables.webhooks import WebhookDelivery, WebhookEndpoint
from core.webhooks import sending
from tests.api.conftest import SETTINGS, MakeSettings
from tests.api.serving import Api, on_a_port, serve, wait_for
from tests.api.test_errors import assert_error
from tests.fixtures.webhook_receiver import Receiver, receiving
from tests.rows import add_job, deliveries_of, get_endpoint

ENDPOINTS = "/v1/webhook_endpoints"
ALL = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
WANTED: dict[str, Any] = {"name": "my hook", "url": "https://hooks.example.com/a", "event_types": [ALL[0]]}


@pytest.fixture
def api(make_settings: MakeSettings, database_url: str, valkey: str) -> Iterator[Api]:
    """On a port, on both databases, with the rules of production."""
    yield from listening(make_settings, database_url, valkey, allow_insecure=False)


@pytest.fixture
def insecure_api(make_settings: MakeSettings, sqlite_url: str, valkey: str) -> Iterator[Api]:
    yield from listening(make_settings, sqlite_url, valkey, allow_insecure=True)


def listening(make_settings: MakeSettings, database_url: str, valkey: str, *, allow_insecure: bool) -> Iterator[Api]:
    settings = make_settings(
        database_url=database_url, redis_url=valkey, inference_urls=["http://127.0.0.1:1"], webhook_allow_insecure=allow_insecure, **SETTINGS
    )
    with serve(settings) as served, on_a_port(served.app) as base_url:
        yield replace(served, base_url=base_url)


def create(api: Api, **fields: Any) -> dict[str, Any]:
    answer = api.client.post(ENDPOINTS, json=WANTED | fields)
    assert answer.status_code == 200, answer.text
    endpoint: dict[str, Any] = answer.json()
    return endpoint


def test_life_of_an_endpoint_with_the_stock_client(api: Api) -> None:
    webhooks = api.openai.webhooks
    assert webhooks.event_types.list().data == ALL
    created = webhooks.create(name="my hook", url="https://hooks.example.com/a?token=1", event_types=["fine_tuning.job.succeeded"])
    assert (created.object, created.name, created.url) == ("webhook_endpoint", "my hook", "https://hooks.example.com/a?token=1")
    assert created.event_types == ["fine_tuning.job.succeeded"]
    assert created.id.startswith("whe_")
    assert len(base64.b64decode(created.signing_secret.removeprefix("whsec_"), validate=True)) == 32
    assert abs(created.created_at - time.time()) < 10
    assert created.updated_at == created.created_at

    found = webhooks.retrieve(created.id)
    assert not hasattr(found, "signing_secret")
    assert created.signing_secret not in api.client.get(f"{ENDPOINTS}/{created.id}").text
    assert found.signing_secret_hint == f"whsec_…{created.signing_secret.rstrip('=')[-4:]}"
    assert found.to_dict()["enabled"] is True

    updated = webhooks.update(created.id, event_types=["fine_tuning.job.failed", "fine_tuning.job.cancelled"], name="renamed")
    assert (updated.name, updated.event_types, updated.url) == ("renamed", ["fine_tuning.job.failed", "fine_tuning.job.cancelled"], created.url)
    assert webhooks.retrieve(created.id) == updated

    rotated = webhooks.rotate_secret(created.id)
    assert rotated.signing_secret != created.signing_secret
    assert get_endpoint(api.database, created.id).secret == rotated.signing_secret
    assert get_endpoint(api.database, created.id).previous_secret is None

    deleted = webhooks.delete(created.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (created.id, True, "webhook_endpoint.deleted")
    with pytest.raises(NotFoundError):
        webhooks.retrieve(created.id)


def test_an_endpoint_whose_answer_got_lost_is_not_created_twice(api: Api) -> None:
    def post(**headers: str) -> Any:
        answer = api.client.post(ENDPOINTS, json=WANTED, headers={name.replace("_", "-"): value for name, value in headers.items()})
        assert answer.status_code == 200, answer.text
        return answer

    first = post().json()
    assert post(x_stainless_retry_count="1").json() == first
    assert post().json()["id"] != first["id"], "two first tries are two endpoints"
    named = post(idempotency_key="hook")
    again = post(idempotency_key="hook")
    assert (again.content, again.headers["idempotent-replayed"]) == (named.content, "true")
    assert len(api.client.get(ENDPOINTS).json()["data"]) == 3
    for endpoint in api.client.get(ENDPOINTS).json()["data"]:
        assert api.client.delete(f"{ENDPOINTS}/{endpoint['id']}").status_code == 200
    anew = post(x_stainless_retry_count="1").json()
    assert [endpoint["id"] for endpoint in api.client.get(ENDPOINTS).json()["data"]] == [anew["id"]], "one that was deleted stands for nothing"


def test_list_is_paged_newest_first(api: Api) -> None:
    ids = [create(api, name=f"hook {number}")["id"] for number in range(5)]
    create_for_other = api.client.post(ENDPOINTS, json=WANTED, headers=api.other_headers)
    assert create_for_other.status_code == 200
    page = api.openai.webhooks.list(limit=2)
    assert [endpoint.id for endpoint in page.data] == [ids[4], ids[3]]
    assert page.has_more
    assert [endpoint.id for endpoint in page] == ids[::-1]
    assert 'signing_secret"' not in api.client.get(ENDPOINTS).text
    assert_error(api.client.get(ENDPOINTS, params={"after": "whe_unknown"}), 400, "invalid_cursor", "after")
    assert api.client.get(ENDPOINTS, params={"limit": 0}).status_code == 400


def test_secret_is_kept_for_a_day_where_that_is_asked(api: Api) -> None:
    created = create(api)
    rotated = api.openai.webhooks.rotate_secret(created["id"], keep_old_secret_active_for_24_hours=True)
    row = get_endpoint(api.database, created["id"])
    assert (row.secret, row.previous_secret) == (rotated.signing_secret, created["signing_secret"])
    assert row.previous_secret_until == pytest.approx(unix_now() + 24 * 3600, abs=60)
    api.openai.webhooks.rotate_secret(created["id"], keep_old_secret_active_for_24_hours=False)
    assert get_endpoint(api.database, created["id"]).previous_secret is None
    answer = api.client.post(f"{ENDPOINTS}/{created['id']}/rotate_secret")  # a body is not needed
    assert answer.json()["signing_secret"] == get_endpoint(api.database, created["id"]).secret


def test_only_changes_change_the_time(api: Api) -> None:
    created = create(api)
    long_ago = 1_000_000.0
    with api.database.transaction() as session:
        session.execute(update(WebhookEndpoint).values(updated_at=long_ago))
    path = f"{ENDPOINTS}/{created['id']}"
    for unchanged in ({}, WANTED, {"enabled": True}):
        assert api.client.post(path, json=unchanged).json()["updated_at"] == long_ago
    assert api.client.post(path, json={"name": "new"}).json()["updated_at"] > long_ago


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"url": "http://hooks.example.com/"}, "url"),
        ({"url": "https://127.0.0.1/"}, "url"),
        ({"url": "https://169.254.169.254/latest"}, "url"),
        ({"url": "https://[::ffff:10.0.0.1]/"}, "url"),
        ({"url": "https://localhost/"}, "url"),
        ({"url": "https://user:password@hooks.example.com/"}, "url"),
        ({"url": "https://hooks.example.com/" + "a" * 2048}, "url"),
        ({"url": "nonsense"}, "url"),
        ({"url": 5}, "url"),
        ({"name": ""}, "name"),
        ({"name": "a\x00"}, "name"),
        ({"name": "a" * 257}, "name"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["batch.completed"]}, "event_types.0"),
        ({"event_types": "fine_tuning.job.failed"}, "event_types"),
        ({"event_types": ALL * 2}, "event_types"),
        ({"colour": "red"}, "colour"),
        ({"enabled": "yes"}, "enabled"),
    ],
)
def test_what_an_endpoint_can_not_be(api: Api, fields: dict[str, Any], param: str) -> None:
    created = create(api)
    answers = [api.client.post(f"{ENDPOINTS}/{created['id']}", json=fields)]
    if param != "enabled":
        answers.append(api.client.post(ENDPOINTS, json=WANTED | fields))
    for answer in answers:
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], param in error["message"]) == (param, True)
        if param == "url" and isinstance(fields["url"], str) and len(fields["url"]) < 2048:
            assert error["code"] == "invalid_webhook_url"
    assert len(api.client.get(ENDPOINTS).json()["data"]) == 1
    assert api.client.get(f"{ENDPOINTS}/{created['id']}").json()["url"] == WANTED["url"]


@pytest.mark.parametrize("missing", ["name", "url", "event_types"])
def test_missing_fields(api: Api, missing: str) -> None:
    assert_error(api.client.post(ENDPOINTS, json={key: value for key, value in WANTED.items() if key != missing}), 400, "missing", missing)


def test_types_are_named_once(api: Api) -> None:
    assert create(api, event_types=[ALL[0], ALL[1], ALL[0]])["event_types"] == [ALL[0], ALL[1]]


def test_setting_allows_insecure_urls(insecure_api: Api) -> None:
    assert create(insecure_api, url="http://127.0.0.1:9/")["url"] == "http://127.0.0.1:9/"


def test_number_of_endpoints_is_limited(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for those that arrive together."""
    monkeypatch.setattr(service, "MAX_ENDPOINTS", 3)
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: status_of_creation(api), range(8)))
    assert sorted(statuses) == [200] * 3 + [400] * 5
    assert_error(api.client.post(ENDPOINTS, json=WANTED), 400, "too_many_webhook_endpoints", None)
    assert api.client.post(ENDPOINTS, json=WANTED, headers=api.other_headers).status_code == 200


def status_of_creation(api: Api) -> int:
    try:
        api.openai.webhooks.create(**WANTED)
    except BadRequestError as error:
        return error.status_code
    return 200


def announced(api: Api) -> None:
    job_id = add_job(api.database, api.project_id)
    with api.database.transaction() as session:
        announce(session, job_id, ALL[0])


def test_disabled_endpoint_gets_nothing_until_it_is_enabled(api: Api) -> None:
    created = create(api)
    announced(api)
    disabled = api.client.post(f"{ENDPOINTS}/{created['id']}", json={"enabled": False, "name": "off"}).json()
    assert (disabled["enabled"], disabled["disabled_reason"], disabled["name"]) == (False, "disabled through the API", "off")
    announced(api)
    (waiting,) = deliveries_of(api.database, created["id"])
    assert (waiting.next_attempt_at, waiting.failed_at is not None) == (None, True)
    enabled = api.openai.webhooks.update(created["id"], extra_body={"enabled": True}).to_dict()
    assert (enabled["enabled"], enabled["disabled_reason"]) == (True, None)
    announced(api)
    assert [delivery.failed_at is None for delivery in deliveries_of(api.database, created["id"])] == [False, True]


def test_deleting_takes_deliveries_along(api: Api) -> None:
    created, kept = create(api), create(api)
    announced(api)
    api.client.delete(f"{ENDPOINTS}/{created['id']}")
    with api.database.reading() as session:
        assert list(session.scalars(select(WebhookDelivery.endpoint_id))) == [kept["id"]]


def test_cancelling_a_job_through_the_api_is_announced(api: Api) -> None:
    created = create(api, event_types=ALL)
    job_id = add_job(api.database, api.project_id)
    with api.database.transaction() as session:
        assert request_cancellation(session, job_id)
    assert [delivery.event_type for delivery in deliveries_of(api.database, created["id"])] == ["fine_tuning.job.cancelled"]


def test_deliveries_are_counted(api: Api) -> None:
    create(api)
    for _ in range(3):
        announced(api)
    with api.database.transaction() as session:
        first, second, _ = session.scalars(select(WebhookDelivery))
        first.delivered_at, second.failed_at = 1.0, 1.0
        first.next_attempt_at = second.next_attempt_at = None
    lines = api.client.get("/metrics").text.splitlines()
    for status in ("pending", "delivered", "failed"):
        assert f'sdft_webhook_deliveries{{status="{status}"}} 1.0' in lines


def test_test_event_arrives_as_a_real_one(insecure_api: Api) -> None:
    api = insecure_api
    with receiving(Receiver([202])) as receiver:
        created = api.openai.webhooks.create(name="x", url=receiver.url, event_types=["fine_tuning.job.failed"])
        result = api.openai.webhooks.test(created.id, event_type="fine_tuning.job.cancelled")
    assert (result.status_code, result.success, result.event_type) == (202, True, "fine_tuning.job.cancelled")
    assert (result.object, result.webhook_endpoint_id) == ("webhook_endpoint.test", created.id)
    (request,) = receiver.received
    event = OpenAI(api_key="unused", webhook_secret=created.signing_secret).webhooks.unwrap(request.body, request.headers)
    assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", "ftjob-sample")  # type: ignore[union-attr]
    assert deliveries_of(api.database, created.id) == []
    assert get_endpoint(api.database, created.id).updated_at == pytest.approx(created.created_at, abs=1)


def test_test_event_carries_both_signatures(insecure_api: Api) -> None:
    with receiving(Receiver([500])) as receiver:
        created = create(insecure_api, url=receiver.url)
        path = f"{ENDPOINTS}/{created['id']}"
        rotated = insecure_api.client.post(f"{path}/rotate_secret", json={"keep_old_secret_active_for_24_hours": True}).json()
        answer = insecure_api.client.post(f"{path}/test", json={"event_type": ALL[0]}).json()
        assert (answer["status_code"], answer["success"]) == (500, True)
        insecure_api.client.post(f"{path}/rotate_secret", json={})
        insecure_api.client.post(f"{path}/test", json={"event_type": ALL[0]})
    client = OpenAI(api_key="unused")
    both, one = receiver.received
    for secret in (created["signing_secret"], rotated["signing_secret"]):
        client.webhooks.unwrap(both.body, both.headers, secret=secret)
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.unwrap(one.body, one.headers, secret=secret)


def test_test_that_does_not_arrive(insecure_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "TOTAL_SECONDS", 0.3)
    with receiving() as receiver:
        url = receiver.url
    created = create(insecure_api, url=url)
    path = f"{ENDPOINTS}/{created['id']}/test"
    answer = insecure_api.client.post(path, json={"event_type": ALL[0]})
    assert_error(answer, 400, "webhook_not_delivered", "webhook_endpoint_id")
    assert "refused" in answer.json()["error"]["message"]
    with receiving(Receiver(wait_seconds=2)) as slow:
        insecure_api.client.post(f"{ENDPOINTS}/{created['id']}", json={"url": slow.url})
        assert "took longer" in insecure_api.client.post(path, json={"event_type": ALL[0]}).json()["error"]["message"]
    assert_error(insecure_api.client.post(path, json={"event_type": "batch.completed"}), 400, "literal_error", "event_type")
    assert_error(insecure_api.client.post(path, json={}), 400, "missing", "event_type")


def test_tests_hold_no_other_request_up(insecure_api: Api) -> None:
    api = insecure_api
    with receiving(Receiver(held=True)) as slow:
        created = create(api, url=slow.url)
        path = f"{ENDPOINTS}/{created['id']}/test"
        threads = [threading.Thread(target=lambda: api.client.post(path, json={"event_type": ALL[0]})) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(slow.received) == 8)
        refused = api.client.post(path, json={"event_type": ALL[0]})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "2"
        assert api.client.get("/v1/files").status_code == 200
        assert slow.most_at_once == len(slow.received) == 8
        slow.released.set()
        for thread in threads:
            thread.join()


def test_secrets_are_in_no_log_and_no_error(insecure_api: Api, caplog: pytest.LogCaptureFixture) -> None:
    created = create(insecure_api, url="http://127.0.0.1:9/canary-in-the-path")
    answer = insecure_api.client.post(f"{ENDPOINTS}/{created['id']}/test", json={"event_type": ALL[0]})
    assert answer.status_code == 400
    for canary in (created["signing_secret"], "canary-in-the-path"):
        assert canary not in answer.text
        assert canary not in caplog.text
