"""uvicorn's HTTP protocol with bounds on what a connection may cost before any code of ours sees a request:

`uvicorn --http api.http_protocol:BoundedHttpProtocol --limit-concurrency N`. By itself uvicorn keeps headers of any size, and waits
for the end of a request's head for ever.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65_536
"""Of the address and the headers together."""
HEAD_SECONDS = 15.0
"""From a connection's or a head's beginning to the head's end."""
LINGERING_SECONDS = 30.0
"""That a client may go on sending a body after it has been answered: to a refused upload, say."""
ROOM_FOR_REFUSALS = 64
"""Connections above the limit of concurrency that are told so; those beyond are closed at once, to keep descriptors for the database."""


ALIVE_PATH = b"/healthz"
"""Answered above the limit of concurrency too: whoever asks whether the process lives would end a busy one."""


class HeadTooLarge(Exception):
    """Raised within the parser, which makes it an invalid request."""


class BoundedHttpProtocol(HttpToolsProtocol):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._unusable_bytes = 0
        """Received since the last complete head or piece of a body."""
        self._head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency + ROOM_FOR_REFUSALS:
            transport.abort()
            return
        self._close_in(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unusable_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unusable_bytes > MAX_HEAD_BYTES:
            self.send_400_response(f"The head of the request is larger than {MAX_HEAD_BYTES} bytes.")
        elif self._deadline is None and self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete):
            self._close_in(LINGERING_SECONDS)  # no request is at work, and uvicorn's own deadline ended with these bytes

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._cancel_deadline()
        self._close_in(HEAD_SECONDS)

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)  # trailers too, which come after the body
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unusable_bytes = 0
        self._cancel_deadline()
        limit = self.limit_concurrency
        if self.url == ALIVE_PATH:
            self.limit_concurrency = None
        try:
            super().on_headers_complete()
        finally:
            self.limit_concurrency = limit

    def on_body(self, body: bytes) -> None:
        self._unusable_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unusable_bytes = 0
        super().on_message_complete()

    def _count(self, *parts: bytes) -> None:
        self._head_bytes += sum(map(len, parts))
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLarge

    def _close_in(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self.transport.close)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
