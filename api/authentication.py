"""API keys, checked before a byte of the body is read.

Raw ASGI and default-deny: whatever is not in OPEN_PATHS needs a key, known route or not. A FastAPI dependency would
answer only after the whole body was parsed.
"""

import hashlib
import time
from dataclasses import dataclass

import anyio.to_thread
from sqlalchemy import or_, update
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.caller import Caller, remember_caller
from api.error_handlers import render
from core.database import Database, unix_now
from core.errors import AuthenticationFailed, ServiceError
from core.logging import get_logger
from core.projects import find_key
from core.tables.projects import ApiKey

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
REMEMBERED_SECONDS = 5
"""How long a key that was found is not looked up again, and so how long a revoked one may still open the door."""
MOST_REMEMBERED = 10_000
LAST_USED_SECONDS = 60
"""Precision of `last_used_at`."""

log = get_logger(__name__)


@dataclass(frozen=True)
class _Remembered:
    caller: Caller
    until: float


class Authentication:
    """Lets a request through with its key in the scope's state, or answers 401 itself. WebSockets are closed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._remembered: dict[bytes, _Remembered] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                remember_caller(scope, await self._caller_of(scope))
            except ServiceError as error:
                await render(error)(scope, receive, send)
                return
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _caller_of(self, scope: Scope) -> Caller:
        plain_key = _bearer_token(Headers(scope=scope).get("authorization"))
        digest = hashlib.sha256(plain_key.encode()).digest()
        known = self._remembered.get(digest)
        if known is not None and known.until > time.monotonic():
            return known.caller
        caller = await anyio.to_thread.run_sync(_look_up, scope["app"].state.api.database, plain_key)
        if len(self._remembered) >= MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[digest] = _Remembered(caller, time.monotonic() + REMEMBERED_SECONDS)
        return caller


def _bearer_token(header: str | None) -> str:
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        message = "You didn't provide an API key. Send it in the header Authorization: Bearer YOUR_KEY."
        raise AuthenticationFailed(message, headers={"www-authenticate": "Bearer"})
    return token.strip()


def _look_up(database: Database, plain_key: str) -> Caller:
    with database.reading() as session:
        key = find_key(session, plain_key)
    if key is None:
        raise AuthenticationFailed(
            "Incorrect API key provided: it is unknown, expired or revoked, or its project is archived.", headers={"www-authenticate": "Bearer"}
        )
    now = unix_now()
    if key.last_used_at is None or key.last_used_at < now - LAST_USED_SECONDS:
        _record_use(database, key.id, now)
    return Caller(key.id, key.project_id, frozenset(key.scopes))


def _record_use(database: Database, key_id: str, now: float) -> None:
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < now - LAST_USED_SECONDS)
    try:
        with database.transaction() as session:
            session.execute(update(ApiKey).where(ApiKey.id == key_id, stale).values(last_used_at=now))
    except ServiceError as error:  # a busy database or a full disk must not turn away a caller whose key is good
        log.warning("last_used_not_recorded", key_id=key_id, error=error.message)
