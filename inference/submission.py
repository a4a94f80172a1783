"""One request's way through the engine: handed in by the event loop, answered token by token from the engine's thread."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

from inference.errors import RequestFailed
from sdft_engine.sampling import Decoding


@dataclass(frozen=True)
class Token:
    """One token of the answer `index`. Log-probabilities are natural; `top_logprobs` by token id."""

    index: int
    token_id: int
    logprob: float | None
    top_logprobs: dict[int, float]
    finish_reason: Literal["stop", "length"] | None


class Submission:
    """The sequences of one request, and the tokens that come back. Made on the event loop that reads it."""

    def __init__(self, sequences: Sequence[Decoding]) -> None:
        self.sequences = list(sequences)
        self.delivered = [0] * len(self.sequences)
        self.failed = False
        self._cancelled = [False] * len(self.sequences)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Token] | RequestFailed] = asyncio.Queue()

    @property
    def adapter(self) -> str | None:
        return self.sequences[0].adapter

    @property
    def ended(self) -> bool:
        return all(self.has_ended(index) for index in range(len(self.sequences)))

    def has_ended(self, index: int) -> bool:
        return self.is_given_up(index) or self.sequences[index].finish_reason is not None

    def is_given_up(self, index: int) -> bool:
        """Nobody waits for this answer any more, or it failed."""
        return self.failed or self._cancelled[index]

    def cancel(self, index: int | None = None) -> None:
        """Stop one answer, or all of them; the engine frees their places before its next step. Safe from any thread."""
        for i in range(len(self.sequences)) if index is None else (index,):
            self._cancelled[i] = True

    def deliver(self) -> None:
        """Engine's thread: hand over every token that is new."""
        tokens = [token for index in range(len(self.sequences)) for token in self._new_tokens(index)]
        if tokens:
            self._put(tokens)

    def fail(self, error: RequestFailed) -> None:
        """Engine's thread: end all answers with this error."""
        self.failed = True
        self._put(error)

    async def tokens(self) -> AsyncGenerator[list[Token]]:
        """Batches of new tokens until every answer has ended. Raises what the engine failed with. Cancels when left early."""
        open_answers = set(range(len(self.sequences)))
        try:
            while open_answers := {index for index in open_answers if not self._cancelled[index]}:
                update = await self._queue.get()
                if isinstance(update, RequestFailed):
                    raise update
                open_answers -= {token.index for token in update if token.finish_reason is not None}
                yield update
        finally:
            self.cancel()

    def _new_tokens(self, index: int) -> list[Token]:
        sequence, start = self.sequences[index], self.delivered[index]
        self.delivered[index] = end = len(sequence.token_ids)
        return [
            Token(
                index,
                sequence.token_ids[position],
                sequence.logprobs[position] if sequence.logprobs else None,
                sequence.top_logprobs[position] if sequence.top_logprobs else {},
                sequence.finish_reason if position == end - 1 else None,
            )
            for position in range(start, end)
        ]

    def _put(self, update: list[Token] | RequestFailed) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, update)
        except RuntimeError:  # the loop is closed: nobody reads any more
            self.cancel()
