"""What chat and plain completions write alike: usage, finite numbers, server-sent events."""

import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from inference.errors import RequestFailed

LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity; vLLM writes this."""

logger = logging.getLogger(__name__)


def clamped(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


def event(data: dict[str, Any] | str) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


async def stream_body(
    chunks: AsyncIterator[dict[str, Any]], head: dict[str, Any], wants_usage: bool, final_usage: Callable[[], dict[str, Any]]
) -> AsyncIterator[bytes]:
    """Chunks as server-sent events, the usage chunk where it was asked for, and [DONE]. A failure becomes an error event."""
    try:
        async for chunk in chunks:
            yield event({**chunk, "usage": None} if wants_usage else chunk)
        if wants_usage:
            yield event({**head, "choices": [], "usage": final_usage()})
    except RequestFailed as error:
        yield event(error.body())
    except Exception:  # a boundary: the status is sent already, only an event can tell the client
        logger.exception("a streamed answer failed")
        yield event(RequestFailed("the inference server failed while answering").body())
    yield event("[DONE]")
