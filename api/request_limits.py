"""What no request may carry: a body beyond the limit, or a NUL in its address (which Postgres can't even look up).

Raw ASGI, because the limit has to hold while the body streams. Routes that stream a body to storage have limits of
their own.
"""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.error_handlers import render
from core.errors import BadRequest, RequestTooLarge

STREAMED_ROUTES = frozenset({("POST", "/v1/files")})


class RequestLimits:
    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._message = f"the request's body is larger than {max_bytes:,} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "\x00" in scope["path"] or b"%00" in scope["query_string"]:
            await render(BadRequest("the address holds a NUL byte", code="invalid_url"))(scope, receive, send)
            return
        if (scope["method"], scope["path"]) in STREAMED_ROUTES:
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await render(RequestTooLarge(self._message))(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        received_bytes = 0

        async def limited() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._max_bytes:
                raise HTTPException(413, self._message)  # the one kind of exception that FastAPI lets pass while it reads a body
            return message

        return limited
