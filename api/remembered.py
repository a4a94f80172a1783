"""An answer that costs something and that anybody may ask for."""

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import anyio.to_thread

Answer = TypeVar("Answer")


class Remembered(Generic[Answer]):
    """Computed in a thread, by one request at a time and at most once in `seconds`, however many ask."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = asyncio.Lock()
        self._known: tuple[Answer, float] | None = None

    async def get(self, compute: Callable[[], Answer]) -> Answer:
        """What `compute` raises is remembered by nobody."""
        async with self._lock:
            if self._known is None or time.monotonic() >= self._known[1]:
                self._known = (await anyio.to_thread.run_sync(compute), time.monotonic() + self._seconds)
            return self._known[0]
