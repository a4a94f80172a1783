"""Threads for what may wait for storage or an inference server. What hangs holds those of its own kind, and none that every other
request needs."""

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread

from core.errors import StorageUnavailable

THREADS = 24
PATIENCE_SECONDS = 10.0
"""That a request waits for one of them."""
END = b""
"""No chunk of an object is empty."""

Result = TypeVar("Result")


class StorageThreads:
    def __init__(self, number: int = THREADS, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.patience_seconds = patience_seconds
        self._places = anyio.Semaphore(number, fast_acquire=True)
        self._limiter = anyio.CapacityLimiter(number)  # never waited for: who has a place has a thread

    async def run(self, function: Callable[..., Result], *arguments: object, patient: bool = False) -> Result:
        """What the function returns. Raises StorageUnavailable where no thread becomes free in time; `patient` callers wait their turn."""
        with anyio.move_on_after(None if patient else self.patience_seconds) as waiting:
            await self._places.acquire()
        if waiting.cancelled_caught:
            raise StorageUnavailable("the server is busy: what it waits for is slow; try again in a moment")
        try:
            return await anyio.to_thread.run_sync(partial(function, *arguments), limiter=self._limiter)
        finally:
            self._places.release()

    async def chunks(self, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
        """The same chunks. No thread is held between two of them, however slow their reader is."""
        while chunk := await self.run(next, chunks, END, patient=True):
            yield chunk
