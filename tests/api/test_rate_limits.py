import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from api.rate_limits import go_duration
from core.settings import Settings
from tests.api.conftest import SETTINGS
from tests.api.serving import Api, on_a_port, serve
from tests.api.test_authentication import OPEN, refusal_before_the_body
from tests.api.test_errors import assert_error

HEADERS = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests")


@pytest.fixture
def limited_api(make_settings: Callable[..., Settings], sqlite_url: str, valkey: str) -> Iterator[Api]:
    """Three requests a minute for each key."""
    with serve(make_settings(redis_url=valkey, inference_urls=["http://127.0.0.1:1"], rate_limit_requests_per_minute=3, **SETTINGS)) as opened:
        yield opened


def shown(answer: Any) -> list[str | None]:
    return [answer.headers.get(name) for name in HEADERS]


def test_a_key_may_send_so_many_requests_and_no_more(limited_api: Api) -> None:
    client = limited_api.client
    for left in (2, 1, 0):
        answer = client.get("/v1/files")
        assert answer.status_code == 200
        assert shown(answer)[:2] == ["3", str(left)]
        assert shown(answer)[2] in ("1m0s", *(f"{seconds}s" for seconds in range(40, 60)))
    refused = client.get("/v1/files")
    message = assert_error(refused, 429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "requests"
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["retry-after"] in message
    assert shown(refused)[:2] == ["3", "0"]
    assert shown(client.get("/v1/files", headers=limited_api.other_headers))[:2] == ["3", "2"], "each key has a limit of its own"


def test_the_limit_holds_before_the_body_is_read_and_for_every_route(limited_api: Api) -> None:
    for _ in range(3):
        limited_api.client.get("/v1/nothing")
    for method, path in (("POST", "/v1/files"), ("POST", "/v1/chat/completions"), ("GET", "/v1/organization/projects"), ("GET", "/v1/nothing")):
        status, error = refusal_before_the_body(limited_api.app, method, path, limited_api.headers)
        assert (status, error["code"]) == (429, "rate_limit_exceeded"), path


def test_a_minute_later_all_of_them_are_there_again(limited_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(4):
        answer = limited_api.client.get("/v1/files")
    assert answer.status_code == 429
    later = time.time() + int(answer.headers["retry-after"]) + 0.1
    monkeypatch.setattr("limits.aio.storage.memory.time.time", lambda: later)
    answer = limited_api.client.get("/v1/files")
    assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (200, "2")


def test_routes_without_a_key_and_refused_keys_count_for_nobody(limited_api: Api) -> None:
    for _ in range(5):
        for path in OPEN:
            assert shown(limited_api.client.get(path)) == [None] * 3
        assert shown(limited_api.client.get("/v1/files", headers={"authorization": "Bearer wrong"})) == [None] * 3
    assert limited_api.client.get("/v1/files").headers["x-ratelimit-remaining-requests"] == "2"


def test_errors_and_refusals_carry_the_headers_too(limited_api: Api) -> None:
    assert shown(limited_api.client.get("/v1/files/unknown"))[:2] == ["3", "2"]
    assert shown(limited_api.client.get("/v1/organization/projects"))[:2] == ["3", "1"]


def test_the_limit_can_be_switched_off(make_settings: Callable[..., Settings], sqlite_url: str, valkey: str) -> None:
    with serve(make_settings(redis_url=valkey, inference_urls=["http://127.0.0.1:1"], rate_limit_requests_per_minute=0, **SETTINGS)) as api:
        for _ in range(5):
            answer = api.client.get("/v1/files")
            assert (answer.status_code, shown(answer)) == (200, [None] * 3)


def test_on_a_real_connection(limited_api: Api) -> None:
    with on_a_port(limited_api.app) as base_url, httpx2.Client(base_url=base_url, headers=limited_api.headers) as client:
        answers = [client.get("/v1/files") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers.get_list(HEADERS[1]) for answer in answers] == [["2"], ["1"], ["0"], ["0"]]


@pytest.mark.parametrize(("seconds", "text"), [(1, "1s"), (59, "59s"), (60, "1m0s"), (61, "1m1s"), (360, "6m0s"), (3600, "1h0m0s"), (3725, "1h2m5s")])
def test_times_are_written_as_openai_does(seconds: int, text: str) -> None:
    assert go_duration(seconds) == text
