"""POST /v1/chat/completions: the conversation through the base model's own chat template, then OpenAI's answer shapes."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from inference.answers import Answer, FinishedAnswer, Piece, ScoredToken
from inference.detokenizer import TokenTable
from inference.errors import BadRequest, Unsupported
from inference.sampling import Server
from inference.schemas import ChatCompletionRequest, Message
from inference.submission import Submission
from inference.wire import clamped, stream_body, usage
from sdft_engine.contract.errors import EngineError
from sdft_engine.contract.quoting import quoted


async def prepare_chat(server: Server, request: ChatCompletionRequest) -> tuple[Submission, list[Answer]]:
    """Everything up to the engine's queue. Raises RequestFailed subclasses."""
    adapter = server.adapters.resolve(request.model)
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    prompt_ids = await server.encode(render(server, request), special_tokens=False, param="messages")
    requested = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    room = server.room(prompt_ids, requested, default=None, param="messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    submission = Submission(server.sequences(request, prompt_ids, adapter, max_new_tokens=room, logprobs=logprobs))
    return submission, server.answers(request, submission)


def render(server: Server, request: ChatCompletionRequest) -> str:
    """The conversation as text. Tools and tool calls that the template would leave out silently are refused."""
    messages = [plain_message(message) for message in request.messages]
    tools: list[dict[str, Any]] | None = None
    if request.tools and (request.model_extra or {}).get("tool_choice") != "none":
        tools = list(request.tools)
    try:
        text = server.chat_format.render(messages, tools)
    except EngineError as error:
        raise BadRequest(error.message, param=error.param) from error
    try:
        server.chat_format.require_shown(messages, tools)
    except EngineError as error:
        raise Unsupported(error.message, param=error.param) from error
    return text


def plain_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: content is a string, text parts are joined by newlines."""
    plain = message.model_dump(exclude_unset=True)
    if not isinstance(message.content, list):
        return plain
    texts = []
    for part in message.content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Unsupported(f"content parts of the type {quoted(part.get('type'))} are not supported; only text is", param="messages")
        texts.append(str(part["text"]))
    return {**plain, "content": "\n".join(texts)}


def chat_completion(server: Server, request: ChatCompletionRequest, finished: list[FinishedAnswer], counts: tuple[int, int]) -> dict[str, Any]:
    return {
        **_head("chat.completion", request.model),
        "choices": [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": chat_logprobs(server.tokens, answer.tokens) if request.logprobs else None,
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            for answer in finished
        ],
        "usage": usage(*counts),
    }


async def chat_chunks(
    server: Server, request: ChatCompletionRequest, pieces: AsyncIterator[Piece], answers: list[Answer], prompt_tokens: int
) -> AsyncIterator[bytes]:
    """The streamed form: one chunk with the role per answer, then text, then the finish reason, then usage where asked."""
    head = _head("chat.completion.chunk", request.model)

    def chunk(index: int, delta: dict[str, Any], piece: Piece | None) -> dict[str, Any]:
        logprobs = chat_logprobs(server.tokens, piece.tokens) if piece is not None and request.logprobs else None
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason if piece else None}
        if piece is not None and piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        return {**head, "choices": [choice]}

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        for answer in answers:
            yield chunk(answer.index, {"role": "assistant", "content": ""}, None)
        async for piece in pieces:
            yield chunk(piece.index, {"content": piece.text} if piece.text or request.logprobs else {}, piece)

    async for data in stream_body(chunks(), head, request.wants_usage, lambda: usage(prompt_tokens, sum(a.token_count for a in answers))):
        yield data


def chat_logprobs(table: TokenTable, tokens: list[ScoredToken]) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": table.text_of(token_id), "logprob": clamped(logprob), "bytes": list(table.bytes_of(token_id))}

    return {
        "content": [{**entry(token.token_id, token.logprob or 0.0), "top_logprobs": [entry(*pair) for pair in token.top_logprobs.items()]} for token in tokens],
        "refusal": None,
    }


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model, "system_fingerprint": None}
