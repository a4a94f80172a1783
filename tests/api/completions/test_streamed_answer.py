import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, nullcontext
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from api.completions.served_models import ServedModel
from api.completions.streamed_answer import MAX_EVENT_BYTES, StreamedAnswer, relayed
from core.errors import InferenceFailed

MODEL = ServedModel("ft:tiny:default:x:1", "internal-name", None)
STREAM = (
    'data: {"model":"internal-name","choices":[{"delta":{"content":"Grüße ✓"}}]}\n\n'
    ": still there\n\n"
    'data:{"model":"internal-name","choices":[]}\r\n\r\n'
    "event: x\ndata: [DONE]\n\n"
    'data: {"after":"the end"}\n\n'
).encode()


def relay(*chunks: bytes | Exception) -> list[str]:
    async def upstream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def collect() -> list[str]:
        return [event.decode() async for event in relayed(upstream(), MODEL)]

    return asyncio.run(collect())


def error_of(event: str) -> dict[str, object]:
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    error: dict[str, object] = json.loads(event[6:])["error"]
    return error


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_chunks_may_end_anywhere(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert relay(*(STREAM[start:end] for start, end in pairwise(edges))) == [
        'data: {"model":"ft:tiny:default:x:1","choices":[{"delta":{"content":"Grüße ✓"}}]}\n\n',
        'data: {"model":"ft:tiny:default:x:1","choices":[]}\n\n',
        "data: [DONE]\n\n",
    ]


def test_connection_that_breaks() -> None:
    *chunks, last = relay(STREAM[:40], STREAM[40:110], InferenceFailed("the connection broke"))
    assert len(chunks) == 1
    assert "Grüße" in chunks[0]
    assert error_of(last) == {"message": "the connection broke", "type": "server_error", "param": None, "code": "inference_failed"}


def test_stream_that_ends_too_early() -> None:
    assert "too early" in str(error_of(relay(STREAM[:100])[-1])["message"])
    assert "too early" in str(error_of(relay()[-1])["message"])


@pytest.mark.parametrize("error", ['{"error":{"message":"internal-name ran out","code":"x"}}', '{"error":"internal-name ran out"}'])
def test_error_of_the_inference_server(error: str) -> None:
    events = relay(f"data: {error}\n\ndata: [DONE]\n\n".encode())
    assert len(events) == 1
    assert error_of(events[0])["message"] == "ft:tiny:default:x:1 ran out"


@pytest.mark.parametrize("data", ["not json", "3", "[]", "null"])
def test_nonsense(data: str) -> None:
    (event,) = relay(f"data: {data}\n\n".encode())
    assert error_of(event)["code"] == "inference_failed"


def test_event_that_never_ends() -> None:
    (event,) = relay(b"data: ", *([b"x" * (1 << 20)] * (MAX_EVENT_BYTES // (1 << 20) + 1)))
    assert "too long" in str(error_of(event)["message"])


@pytest.mark.parametrize("ending", ["complete", "client left", "send fails"])
def test_answer_of_the_inference_server_is_closed_however_it_ends(ending: str) -> None:
    closed: list[bool] = []

    async def upstream() -> AsyncIterator[bytes]:
        yield STREAM[:110]
        if ending != "complete":
            await asyncio.sleep(60)
        yield STREAM[110:]

    async def receive() -> Message:
        if ending != "client left":
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if ending == "send fails" and message["type"] == "http.response.body":
            raise OSError("the connection is gone")

    async def respond() -> None:
        opened = AsyncExitStack()
        opened.callback(closed.append, True)
        await StreamedAnswer(upstream(), MODEL, opened)({"type": "http"}, receive, send)

    with pytest.raises(OSError, match="gone") if ending == "send fails" else nullcontext():
        asyncio.run(respond())
    assert closed == [True]
