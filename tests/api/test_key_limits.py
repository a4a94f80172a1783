from contextlib import ExitStack

import pytest

from api.key_limits import HeldByKeys
from core.errors import RateLimited

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


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
