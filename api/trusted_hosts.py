"""Which names this server answers to. A page in a browser can point a name of its own at this machine; its requests still
carry that name in their Host header.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.error_handlers import render
from core.errors import BadRequest

OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")
"""Always answered: health checks on this machine use them, and no page can have them."""


class TrustedHosts:
    """Starlette's check of the Host header, refusing in this server's own form."""

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]) -> None:
        self._app = app
        self._check = TrustedHostMiddleware(_stay_silent, [*OWN_NAMES, *allowed_hosts], www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or await self._passes(scope, receive):
            await self._app(scope, receive, send)
            return
        host = Headers(scope=scope).get("host", "")[:256]
        error = BadRequest(f"this server does not answer to the host {host!r}; its operator can add it to SDFT_ALLOWED_HOSTS", code="invalid_host")
        await render(error)(scope, receive, send)

    async def _passes(self, scope: Scope, receive: Receive) -> bool:
        """The check answers a request itself where it refuses it; where it passes it on, nothing is said."""
        said: list[Message] = []

        async def listen(message: Message) -> None:
            said.append(message)

        await self._check(scope, receive, listen)
        return not said


async def _stay_silent(scope: Scope, receive: Receive, send: Send) -> None:
    """Stands where the application would."""
