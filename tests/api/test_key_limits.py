from contextlib import ExitStack

import httpx2
import pytest

from api.key_limits import HeldByKeys
from core.errors import RateLimited
from tests.api.serving import Api, wait_for
from tests.api.test_errors import assert_error


def test_a_key_holds_so_many_and_others_are_not_counted() -> None:
    limit = HeldByKeys(3, "answers")
    with ExitStack() as opened:
        opened.enter_context(limit.held("a", 2))
        opened.enter_context(limit.held("a"))
        opened.enter_context(limit.held("b"))
        with pytest.raises(RateLimited, match="3 answers") as caught, limit.held("a"):
            pass
        assert (caught.value.code, caught.value.headers) == ("too_many_open", {"retry-after": "2"})
    with limit.held("a", 3):
        pass


def test_what_is_held_is_given_back_by_an_error_too() -> None:
    limit = HeldByKeys(1, "answers")
    for _ in range(3):
        with pytest.raises(ValueError, match="x"), limit.held("a"):
            raise ValueError("x")


def test_a_request_that_asks_for_more_than_a_key_may_hold_is_let_through_alone() -> None:
    limit = HeldByKeys(3, "answers")
    with limit.held("a", 100), pytest.raises(RateLimited), limit.held("a"):
        pass
    with limit.held("a"), pytest.raises(RateLimited), limit.held("a", 100):
        pass


def test_zero_is_no_limit() -> None:
    limit = HeldByKeys(0, "answers")
    with limit.held("a", 1000), limit.held("a", 1000):
        pass


def test_a_key_has_so_many_streams_open(live_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a connection for as long as the job lasts."""
    monkeypatch.setattr(live_api.state.streams_of_keys, "_most", 2)
    url = f"{live_api.base_url}/v1/fine_tuning/jobs/{live_api.create_job()['id']}/events?stream=true"
    with httpx2.Client(headers=live_api.headers, timeout=20) as client:
        with client.stream("GET", url) as first, client.stream("GET", url) as second:
            assert (first.status_code, second.status_code) == (200, 200)
            assert_error(client.get(url), 429, "too_many_open")
            assert client.get(url.removesuffix("?stream=true")).status_code == 200

        def opens_again() -> bool:
            with client.stream("GET", url) as again:
                return again.status_code == 200

        wait_for(opens_again)
