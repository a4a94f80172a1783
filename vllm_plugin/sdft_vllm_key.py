"""A door for vLLM's server: without the key nobody gets further than /health."""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from sdft_adapter_uploads import AdapterUploads, UploadedFiles

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RequireKey:
    """ASGI middleware (`--middleware sdft_vllm_key.RequireKey`): asks every path but /health for the key in VLLM_API_KEY, before
    the body is read. vLLM itself (0.32) asks under some prefixes only; /adapters, which loads and unloads adapters, is not among them.

    Where ADAPTER_UPLOADS_DIR names a directory, adapters are sent there over HTTP (sdft_adapter_uploads), behind the same door.

    Raises RuntimeError at the server's start where VLLM_API_KEY is not set, or the directory is not for this server alone.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        uploads_dir = os.environ.get("ADAPTER_UPLOADS_DIR")
        self._app = AdapterUploads(app, UploadedFiles(Path(uploads_dir))) if uploads_dir else app
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise RuntimeError("VLLM_API_KEY is not set: whoever reaches this server could load adapters into it")
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or scope.get("path") == "/health" or hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = b'{"error": {"message": "a valid bearer key is needed", "type": "invalid_request_error", "param": null, "code": 401}}'
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})
