"""Work that ends when its client leaves, and streams that cancel their work however they end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def unless_client_leaves(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects; then raises ClientLeft."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        if not working.done():
            with suppress(asyncio.CancelledError):
                await working


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. `on_close` runs however the response ends: complete, cut off, or never begun."""

    def __init__(self, events: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def begun(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    """An iterator again, after its first item was awaited on its own."""
    yield first
    async for item in rest:
        yield item
