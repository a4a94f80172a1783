import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Message

from api import slow_bodies
from api.slow_bodies import SlowBodies

FIRST = {"type": "http.request", "body": b"1", "more_body": True}
LAST = {"type": "http.request", "body": b"2", "more_body": False}


async def read_body(request: Request) -> PlainTextResponse:
    return PlainTextResponse((await request.body()).decode())


def answer_to(*messages: tuple[float, dict[str, Any]]) -> list[Message]:
    """What is sent to a client whose messages come after those seconds, and then no more."""
    coming, sent = list(messages), []

    async def receive() -> Message:
        if not coming:
            await asyncio.Event().wait()
        seconds, message = coming.pop(0)
        await asyncio.sleep(seconds)
        return message

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    app = Starlette(routes=[Route("/", read_body, methods=["POST"])])
    asyncio.run(asyncio.wait_for(SlowBodies(app)(scope, receive, send), 10))
    return sent


def test_body_that_stops_is_answered_and_its_connection_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_bodies, "PATIENCE_SECONDS", 0.1)
    start = answer_to((0, FIRST))[0]
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]


def test_body_in_small_pieces_does_not_begin_the_wait_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_bodies, "PATIENCE_SECONDS", 0.2)
    assert answer_to(*[(0.05, FIRST)] * 200)[0]["status"] == 408


def test_bytes_that_come_buy_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """But never more than the patience that there is with a beginning: much that came at once buys no hours of silence."""
    monkeypatch.setattr(slow_bodies, "PATIENCE_SECONDS", 1.5)
    much = FIRST | {"body": b"x" * 40_960}
    assert answer_to(*[(0.4, much)] * 4, (0.4, LAST))[0]["status"] == 200
    assert answer_to((0, much), (10, LAST))[0]["status"] == 408


def test_client_is_awaited_after_its_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway learns so that a client has left."""
    monkeypatch.setattr(slow_bodies, "PATIENCE_SECONDS", 0.1)

    async def waits() -> Message:
        messages = [LAST, {"type": "http.disconnect"}]

        async def receive() -> Message:
            await asyncio.sleep(0.3 if len(messages) == 1 else 0)
            return messages.pop(0)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            received.append(await receive())

        received: list[Message] = []
        await SlowBodies(app)({"type": "http"}, receive, None)  # type: ignore[arg-type]
        return received[0]

    assert asyncio.run(waits())["type"] == "http.disconnect"
