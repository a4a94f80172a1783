"""From a request's fields to the sequences that the engine decodes. Everything that can be wrong is a 400 here."""

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from inference.adapters import AdapterRegistry
from inference.answers import Answer
from inference.detokenizer import StopStrings, TextDecoder, TokenTable
from inference.engine import Engine
from inference.errors import BadRequest, ContextExceeded
from inference.schemas import SamplingRequest
from inference.submission import Submission
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.sampling import Decoding, SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them overflows."""


@dataclass(frozen=True)
class Server:
    """What every route needs."""

    engine: Engine
    adapters: AdapterRegistry
    base_model_id: str
    chat_format: ChatFormat
    tokens: TokenTable
    vocabulary_size: int

    async def encode(self, text: str, *, special_tokens: bool, param: str) -> list[int]:
        """Token ids of a text; off the event loop, since a long text takes a while. Raises BadRequest."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRequest(f"{param} holds half of a surrogate pair, which is not text", param=param) from error
        encoding = await run_in_threadpool(self.chat_format.tokenizer.encode, text, add_special_tokens=special_tokens)
        return list(encoding.ids)

    def room(self, prompt_ids: list[int], requested: int | None, *, default: int | None, param: str) -> int:
        """New tokens that the context leaves after this prompt: the requested number, else at most `default`.

        Raises BadRequest for an empty prompt, ContextExceeded where prompt and answer don't fit.
        """
        if not prompt_ids:
            raise BadRequest("the prompt is empty", param=param)
        context, length = self.chat_format.context_length, len(prompt_ids)
        if length + (1 if requested is None else requested) > context:
            asked = f"{length} in the prompt" + ("" if requested is None else f", {requested} for the answer")
            raise ContextExceeded(f"This model's maximum context length is {context} tokens. However, you requested {asked}.", param=param)
        if requested is not None:
            return requested
        return context - length if default is None else min(default, context - length)

    def sequences(self, request: SamplingRequest, prompt_ids: list[int], adapter: str | None, *, max_new_tokens: int, logprobs: int | None) -> list[Decoding]:
        """The `n` sequences that answer one prompt. With a seed, each has a seed of its own that follows from it."""
        stops = frozenset(request.stop_token_ids or ()) | (frozenset() if request.ignore_eos else self.chat_format.eos_token_ids)
        temperature = 1.0 if request.temperature is None else request.temperature
        return [
            Decoding(
                prompt_ids,
                SamplingParams(
                    max_new_tokens=max_new_tokens,
                    temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
                    top_p=1.0 if request.top_p is None else request.top_p,
                    seed=None if request.seed is None else (request.seed + index) % 2**63,
                    stop_token_ids=stops,
                    logprobs=logprobs,
                    frequency_penalty=request.frequency_penalty or 0.0,
                    presence_penalty=request.presence_penalty or 0.0,
                    logit_bias=self._bias(request),
                ),
                adapter,
            )
            for index in range(request.n or 1)
        ]

    def answers(self, request: SamplingRequest, submission: Submission, offsets: list[int] | None = None) -> list[Answer]:
        """One growing answer per sequence; `offsets` says where each one's text starts (after an echoed prompt)."""
        return [
            Answer(index, TextDecoder(self.chat_format.tokenizer), StopStrings(request.stop_strings), self.chat_format.eos_token_ids, offset)
            for index, offset in enumerate(offsets or [0] * len(submission.sequences))
        ]

    def _bias(self, request: SamplingRequest) -> dict[int, float]:
        bias: dict[int, float] = {}
        for key, value in (request.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < self.vocabulary_size):
                raise BadRequest(f"logit_bias names {key[:32]!r}, which is no token id of this model (0 to {self.vocabulary_size - 1})", param="logit_bias")
            bias[int(key)] = value
        return bias
