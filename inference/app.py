"""The application: authentication before the body is read, OpenAI's error bodies, the engine's life."""

import hmac
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.adapters import MAX_ADAPTERS, AdapterRegistry
from inference.connections import ClientLeft
from inference.detokenizer import TokenTable
from inference.engine import Engine
from inference.errors import Overloaded, RequestFailed, Unauthorised, error_body
from inference.routes import router
from inference.sampling import Server

MAX_BODY_BYTES = 16 * 1024**2
CLIENT_CLOSED_REQUEST = 499
MAX_ERRORS_READ = 64
"""Those of one place follow each other."""

logger = logging.getLogger(__name__)


def create_app(engine: Engine, *, base_model_id: str, adapters_dir: Path, api_key: str | None = None, max_adapters: int = MAX_ADAPTERS) -> FastAPI:
    """The server around an engine that is not started yet; its thread lives as long as the application."""
    adapters_dir.mkdir(parents=True, exist_ok=True)
    chat_format = engine.model.chat_format
    vocabulary_size = int(engine.model.network.get_input_embeddings().num_embeddings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(title="Embedded inference server", lifespan=lifespan, openapi_url=None)
    registry = AdapterRegistry(engine, base_model_id, adapters_dir, max_adapters)
    app.state.server = Server(engine, registry, base_model_id, chat_format, TokenTable(chat_format.tokenizer), vocabulary_size)
    app.include_router(router)
    app.add_exception_handler(RequestFailed, _request_failed)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(ClientLeft, _client_left)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(Gate, api_key=api_key)
    return app


class Gate:
    """Asks every route but /health for the key, before the body is read, and cuts bodies off that are too large."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] != "/health" and not self._allows(dict(scope["headers"]).get(b"authorization", b"")):
            await _respond(Unauthorised("a valid bearer key is needed"))(scope, receive, send)
        else:
            await self._app(scope, _limited(receive), send)

    def _allows(self, given: bytes) -> bool:
        return self._expected is None or hmac.compare_digest(given, self._expected)


def _limited(receive: Receive) -> Receive:
    received_bytes = 0

    async def receive_some() -> Message:
        nonlocal received_bytes
        message = await receive()
        received_bytes += len(message.get("body", b""))
        if received_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
        return message

    return receive_some


def _json(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """ASCII only: messages quote what clients sent, which need not be valid text."""
    return Response(json.dumps(body), status_code=status, headers=headers, media_type="application/json")


def _respond(error: RequestFailed) -> Response:
    return _json(error.status, error.body(), {"retry-after": "2"} if isinstance(error, Overloaded) else None)


async def _request_failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestFailed)
    return _respond(error)


async def _invalid_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()[:MAX_ERRORS_READ]
    if problems[0]["type"] == "json_invalid":
        return _json(400, error_body(f"the body is not valid JSON: {problems[0]['ctx']['error']}", "invalid_request_error", None, "json_invalid"))
    if not isinstance(error.body, dict):
        return _json(400, error_body("the body must be a JSON object, sent as application/json", "invalid_request_error", None, "invalid_content_type"))
    param = _path_of(problems[0], error.body)
    reasons = list(dict.fromkeys(problem["msg"] for problem in problems if _path_of(problem, error.body) == param))
    return _json(400, error_body(f"{param}: {', or '.join(reasons[:3])}", "invalid_request_error", param, problems[0]["type"]))


def _path_of(problem: dict[str, Any], body: Any) -> str:
    """Where in the body the problem lies, as `messages[0].role`. Names of alternative types that pydantic adds are left out."""
    path = ""
    for part in problem["loc"][1:]:
        is_key = isinstance(body, dict) and (part in body or problem["type"] == "missing")
        if not is_key and not (isinstance(body, list) and isinstance(part, int) and part < len(body)):
            break
        path += f".{part}" if is_key else f"[{part}]"
        body = body.get(part) if is_key else body[part]
    return path.removeprefix(".")


async def _http_exception(_: Request, error: Exception) -> Response:
    """Unknown routes, wrong methods, bodies that are too large."""
    assert isinstance(error, HTTPException)
    code = "json_invalid" if error.status_code == 400 else None
    return _json(error.status_code, error_body(str(error.detail), "invalid_request_error", None, code), dict(error.headers or {}))


async def _client_left(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _unexpected(_: Request, error: Exception) -> Response:
    """The server logs the exception itself; the client learns nothing of it."""
    return _respond(RequestFailed("the inference server failed"))
