"""Server-sent events, relayed one by one with the model's public id in place of its internal name."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import orjson
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.completions.served_models import ServedModel
from api.completions.upstream_errors import error_event
from core.errors import InferenceFailed

DONE = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = 8 << 20


class StreamedAnswer(StreamingResponse):
    """Owns the inference server's open answer, and closes it however the response ends: that cancels it there."""

    def __init__(self, chunks: AsyncIterator[bytes], model: ServedModel, opened: AsyncExitStack) -> None:
        super().__init__(relayed(chunks, model), media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._opened:
            await super().__call__(scope, receive, send)


async def relayed(chunks: AsyncIterator[bytes], model: ServedModel) -> AsyncIterator[bytes]:
    """Ends with [DONE], or with an error event where the answer broke off."""
    try:
        async for data in events(chunks):
            if data == b"[DONE]":
                yield DONE
                return
            chunk = _parsed(data)
            if "error" in chunk:
                yield _event(error_event(chunk, model))
                return
            yield _event({**chunk, "model": model.public_id})
        yield _event(InferenceFailed("the inference server ended the answer too early").body())
    except InferenceFailed as error:
        yield _event(error.body())


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event. Chunks may end anywhere. Raises InferenceFailed on an event that never ends."""
    buffered = b""
    async for chunk in chunks:
        *complete, buffered = (buffered + chunk.replace(b"\r", b"")).split(b"\n\n")
        for event in complete:
            data = b"\n".join(line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:"))
            if data:  # else a comment that keeps the connection open
                yield data
        if len(buffered) > MAX_EVENT_BYTES:
            raise InferenceFailed("the inference server sent an event that is too long")


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        chunk = None
    if not isinstance(chunk, dict):
        raise InferenceFailed("the inference server sent something that is no chunk of an answer")
    return chunk


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
