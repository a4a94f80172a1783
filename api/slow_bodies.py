"""How long the API waits for a request's body: a client that sends a byte a minute would hold its connection for days."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATIENCE_SECONDS = 60.0
"""Waited for the next part of a body at most, and of that one second for each of these bytes that came before:"""
BYTES_PER_SECOND = 4096


class SlowBodies:
    """Answers 408 where a body comes too slowly. Only the time in which the API waits counts, not that in which it stores what came."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, self._impatient(receive) if scope["type"] == "http" else receive, send)

    def _impatient(self, receive: Receive) -> Receive:
        clock = asyncio.get_running_loop().time
        left_seconds, complete = PATIENCE_SECONDS, False

        async def impatient() -> Message:
            nonlocal left_seconds, complete
            if complete:  # now it waits for the client to leave
                return await receive()
            asked = clock()
            try:
                async with asyncio.timeout(left_seconds):
                    message = await receive()
            except TimeoutError:
                message_text = f"the body came too slowly: in {PATIENCE_SECONDS:g} s and more, less than {BYTES_PER_SECOND:,} bytes a second"
                raise HTTPException(408, message_text, headers={"connection": "close"}) from None  # the one kind that FastAPI lets pass
            left_seconds = min(PATIENCE_SECONDS, left_seconds + len(message.get("body", b"")) / BYTES_PER_SECOND - (clock() - asked))
            complete = not message.get("more_body", False)
            return message

        return impatient
