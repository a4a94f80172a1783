"""POST /v1/completions: plain continuation of texts or token ids, with the prompt's own log-probabilities where asked."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from inference.answers import Answer, FinishedAnswer, Piece, ScoredToken, pieces_of
from inference.detokenizer import TextDecoder, TokenTable
from inference.errors import AdapterGone, BadRequest
from inference.sampling import Server
from inference.schemas import CompletionRequest
from inference.submission import Submission
from inference.wire import clamped, stream_body, usage
from sdft_engine.generation import score

DEFAULT_MAX_TOKENS = 16
MAX_ANSWERS = 1024


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request. `text` is None where token ids were given."""

    token_ids: list[int]
    text: str | None


@dataclass
class Completion:
    """A request on its way: what to echo before each answer, and what decodes. `submission` is None for max_tokens 0."""

    prompts: list[Prompt]
    echoes: list[Piece] = field(default_factory=list)
    submission: Submission | None = None
    answers: list[Answer] = field(default_factory=list)

    async def pieces(self) -> AsyncGenerator[Piece]:
        for echo in self.echoes:
            yield echo
        if self.submission is not None:
            async with aclosing(pieces_of(self.submission, self.answers)) as pieces:
                async for piece in pieces:
                    yield piece

    @property
    def counts(self) -> tuple[int, int]:
        return sum(len(prompt.token_ids) for prompt in self.prompts), sum(answer.token_count for answer in self.answers)


async def prepare_completion(server: Server, request: CompletionRequest) -> Completion:
    """Everything up to the engine's queue. Raises RequestFailed subclasses."""
    adapter = server.adapters.resolve(request.model)
    if request.max_tokens == 0 and not request.echo:
        raise BadRequest("max_tokens 0 asks for nothing unless echo is true", param="max_tokens")
    if len(_separate(request)) * (request.n or 1) > MAX_ANSWERS:
        raise BadRequest(f"a request may ask for {MAX_ANSWERS} answers at most, over all its prompts", param="prompt")
    completion = Completion([await _encoded(server, prompt) for prompt in _separate(request)])
    rooms = [server.room(prompt.token_ids, request.max_tokens, default=DEFAULT_MAX_TOKENS, param="prompt") for prompt in completion.prompts]
    choices = request.n or 1
    offsets: list[int] = []
    for position, prompt in enumerate(completion.prompts):
        if request.echo:
            echo = await _echo(server, request, prompt, adapter)
            completion.echoes += [Piece(position * choices + i, echo.text, echo.tokens, echo.finish_reason) for i in range(choices)]
            offsets += [len(echo.text)] * choices
    if request.max_tokens != 0:
        sequences = [
            sequence
            for prompt, room in zip(completion.prompts, rooms, strict=True)
            for sequence in server.sequences(request, prompt.token_ids, adapter, max_new_tokens=room, logprobs=request.logprobs)
        ]
        completion.submission = Submission(sequences)
        completion.answers = server.answers(request, completion.submission, offsets)
    return completion


def _separate(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request in its four forms."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise BadRequest("the prompt is empty", param="prompt")
    if isinstance(prompt[0], int):
        return [[token_id for token_id in prompt if isinstance(token_id, int)]]
    return [part for part in prompt if not isinstance(part, int)]


async def _encoded(server: Server, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(await server.encode(prompt, special_tokens=True, param="prompt"), prompt)
    if any(token_id >= server.vocabulary_size for token_id in prompt):
        raise BadRequest(f"the prompt holds {max(prompt)}, which is no token id of this model (0 to {server.vocabulary_size - 1})", param="prompt")
    return Prompt(prompt, None)


async def _echo(server: Server, request: CompletionRequest, prompt: Prompt, adapter: str | None) -> Piece:
    """The prompt as the first piece of its answers. The first token has no log-probability: nothing stands before it."""
    top = request.logprobs
    own: list[float] = []
    alternatives: list[dict[int, float]] = []
    if top is not None and len(prompt.token_ids) > 1:
        own, alternatives = await asyncio.wrap_future(server.engine.call(lambda: _scored(server, prompt.token_ids, adapter, top)))
    decoder, text, tokens = TextDecoder(server.chat_format.tokenizer, skip_special_tokens=False), "", []
    for position, token_id in enumerate(prompt.token_ids):
        logprob = own[position - 1] if own and position else None
        tokens.append(ScoredToken(token_id, logprob, alternatives[position - 1] if alternatives and position else {}, len(text)))
        text += decoder.feed(token_id)
    text += decoder.finish()
    return Piece(0, text if prompt.text is None else prompt.text, tokens, "length" if request.max_tokens == 0 else None)


def _scored(server: Server, token_ids: list[int], adapter: str | None, top: int) -> tuple[list[float], list[dict[int, float]]]:
    """On the engine's thread."""
    if adapter is not None and adapter not in server.engine.model.adapters.shapes:
        raise AdapterGone("the model was unloaded before its answer was complete")
    return score(server.engine.model, token_ids, adapter, top)


def text_completion(server: Server, request: CompletionRequest, finished: list[FinishedAnswer], counts: tuple[int, int]) -> dict[str, Any]:
    choices = [_choice(server, request, a.index, a.text, a.tokens, a.finish_reason, a.stop_reason) for a in finished]
    return {**_head(request.model), "choices": choices, "usage": usage(*counts)}


async def completion_chunks(server: Server, request: CompletionRequest, completion: Completion, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
    """The streamed form: text as it comes, the finish reason in each answer's last chunk, usage where asked."""
    head = _head(request.model)

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        async for piece in pieces:
            yield {**head, "choices": [_choice(server, request, piece.index, piece.text, piece.tokens, piece.finish_reason, piece.stop_reason)]}

    async for data in stream_body(chunks(), head, request.wants_usage, lambda: usage(*completion.counts)):
        yield data


def _choice(
    server: Server, request: CompletionRequest, index: int, text: str, tokens: list[ScoredToken], finish_reason: str | None, stop_reason: str | int | None
) -> dict[str, Any]:
    logprobs = None if request.logprobs is None else completion_logprobs(server.tokens, tokens)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason, "stop_reason": stop_reason}


def completion_logprobs(table: TokenTable, tokens: list[ScoredToken]) -> dict[str, Any]:
    return {
        "tokens": [table.text_of(token.token_id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else clamped(token.logprob) for token in tokens],
        "top_logprobs": [_alternatives(table, token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _alternatives(table: TokenTable, token: ScoredToken) -> dict[str, float] | None:
    """By text, as OpenAI has it: the likeliest tokens and the one that stands there. Of tokens that read alike the likelier."""
    if token.logprob is None:
        return None
    named: dict[str, float] = {}
    for token_id, logprob in [*token.top_logprobs.items(), (token.token_id, token.logprob)]:
        text = table.text_of(token_id)
        named[text] = max(clamped(logprob), named.get(text, clamped(logprob)))
    return named


def _head(model: str) -> dict[str, Any]:
    return {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model, "system_fingerprint": None}
