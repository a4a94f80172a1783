"""From the engine's tokens to pieces of text: detokenised, cut at stop strings, with the tokens that made them."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from inference.detokenizer import StopStrings, TextDecoder
from inference.submission import Submission, Token

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class ScoredToken:
    """A token of the prompt or of an answer. `offset` is where its text starts, in characters; `logprob` None means unknown."""

    token_id: int
    logprob: float | None
    top_logprobs: dict[int, float]
    offset: int


@dataclass(frozen=True)
class Piece:
    """Text that the answer `index` grew by, and the tokens that it took. The last piece has a finish reason."""

    index: int
    text: str
    tokens: list[ScoredToken]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass
class Answer:
    """One answer while it grows."""

    index: int
    decoder: TextDecoder
    stops: StopStrings
    eos_token_ids: frozenset[int]
    offset: int = 0
    token_count: int = 0
    ended: bool = False
    _unshown: list[ScoredToken] = field(default_factory=list)

    def advance(self, token: Token) -> Piece | None:
        """The piece that this token completes, if it completes one."""
        self.token_count += 1
        self._unshown.append(ScoredToken(token.token_id, token.logprob, token.top_logprobs, self.offset))
        text = "" if token.finish_reason == "stop" else self.decoder.feed(token.token_id)
        if token.finish_reason is not None:
            text += self.decoder.finish()
        self.offset += len(text)
        shown = self.stops.feed(text)
        finish_reason: FinishReason | None = "stop" if self.stops.found is not None else token.finish_reason
        if finish_reason is not None:
            shown += self.stops.finish()
        if not shown and finish_reason is None:
            return None
        self.ended = finish_reason is not None
        tokens, self._unshown = self._unshown, []
        return Piece(self.index, shown, tokens, finish_reason, self._stop_reason(token))

    def _stop_reason(self, token: Token) -> str | int | None:
        if self.stops.found is not None:
            return self.stops.found
        return token.token_id if token.finish_reason == "stop" and token.token_id not in self.eos_token_ids else None


async def pieces_of(submission: Submission, answers: list[Answer]) -> AsyncGenerator[Piece]:
    """Pieces as they come, until every answer has its last one. Leaving early cancels the rest."""
    async with aclosing(submission.tokens()) as batches:
        async for tokens in batches:
            for token in tokens:
                answer = answers[token.index]
                if answer.ended or (piece := answer.advance(token)) is None:
                    continue
                if piece.finish_reason is not None:
                    submission.cancel(token.index)
                yield piece


@dataclass
class FinishedAnswer:
    """All pieces of one answer, joined."""

    index: int
    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason
        self.stop_reason = piece.stop_reason


async def collect(pieces: AsyncIterator[Piece], count: int) -> list[FinishedAnswer]:
    finished = [FinishedAnswer(index) for index in range(count)]
    async for piece in pieces:
        finished[piece.index].add(piece)
    return finished
