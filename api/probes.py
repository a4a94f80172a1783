"""Questions to what this server depends on, for routes that anybody may ask as often as they like."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread

PROBE_SECONDS = 4.0
"""After which what has not answered counts as unreachable, so that a probe of an orchestrator gets its answer."""

Answer = TypeVar("Answer")


class Probes:
    """Each question is asked once at a time, however many want its answer: its thread may hang on for a minute, and is none that requests
    need."""

    def __init__(self) -> None:
        self._asked: dict[str, asyncio.Task[Any]] = {}

    async def ask(self, name: str, question: Callable[[], Answer], otherwise: Answer) -> Answer:
        """Its answer, or that of the same question which is under way; `otherwise` where there is none in time."""
        asked: asyncio.Task[Answer] | None = self._asked.get(name)
        if asked is None or asked.done():
            thread = anyio.to_thread.run_sync(question, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
            self._asked[name] = asked = asyncio.create_task(thread)
        answer = otherwise
        with anyio.move_on_after(PROBE_SECONDS):
            answer = await asyncio.shield(asked)
        return answer
