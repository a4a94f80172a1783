"""How many requests a key may send a minute, before a byte of the body is read.

Counted in this process: several API processes allow as many times as much. A counter that they share would put the broker into
the way of every request, which the service otherwise does without.
"""

import math
import time

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.caller import caller_of
from api.error_handlers import render
from core.errors import RateLimited


class RateLimits:
    """Stands behind the authentication. Counts by fixed windows, each of which begins with a key's first request."""

    def __init__(self, app: ASGIApp, requests_per_minute: int) -> None:
        self._app = app
        self._limit = RateLimitItemPerMinute(requests_per_minute)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = caller_of(scope)
        if caller is None:
            await self._app(scope, receive, send)
            return
        allowed = await self._limiter.hit(self._limit, caller.key_id)
        window = await self._limiter.get_window_stats(self._limit, caller.key_id)
        left_seconds = max(1, math.ceil(window.reset_time - time.time()))
        headers = {
            "x-ratelimit-limit-requests": str(self._limit.amount),
            "x-ratelimit-remaining-requests": str(window.remaining),
            "x-ratelimit-reset-requests": go_duration(left_seconds),
        }
        if not allowed:
            message = f"Rate limit reached: {self._limit.amount:,} requests a minute for one API key. Please try again in {left_seconds} s."
            await render(RateLimited(message, headers={**headers, "retry-after": str(left_seconds)}))(scope, receive, send)
            return
        raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *raw_headers]
            await send(message)

        await self._app(scope, receive, send_with_limits)


def go_duration(seconds: int) -> str:
    """As OpenAI writes times in headers: 1s, 6m0s, 1h0m0s."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"
