"""Every error leaves as OpenAI's `{"error": {"message", "type", "param", "code"}}`; FastAPI's own bodies never do."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from api.idempotency import AlreadyAnswered
from api.strict_json import JsonTooDeep
from core.errors import BadRequest, MethodNotAllowed, NotFound, RequestTimeout, RequestTooLarge, ServiceError
from sdft_engine.contract.quoting import shortened

MAX_ERRORS_READ = 64
"""Those of one place follow each other; the others are not told."""


def install(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(AlreadyAnswered, _first_answer)


def render(error: ServiceError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


def bad_request(errors: Sequence[Any], value: Any, prefix: str = "") -> BadRequest:
    """The first wrong place of a validated `value`, as pydantic described it. `prefix` is where the value itself stands.

    A union reports one error for each of its members; they become one message, and the names of the members, which
    pydantic puts into the location, are left out of the param.
    """
    errors = errors[:MAX_ERRORS_READ]
    first = _param_of(errors[0], value)
    messages = [_message_of(error) for error in errors if _param_of(error, value) == first]
    param = ".".join(part for part in (prefix, first) if part) or None
    message = " or ".join(dict.fromkeys(messages))
    return BadRequest(f"{param}: {message}" if param else message, code=str(errors[0]["type"]), param=param)


def _param_of(error: Any, value: Any) -> str:
    """The dotted path of the error within `value`."""
    path: list[str] = []
    for part in error["loc"]:
        known = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int) and part < len(value)
        if not known and error["type"] != "missing":
            break
        path.append(shortened(str(part)))
        value = value[part] if known else None
    return ".".join(path)


def _message_of(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:] if message.startswith(("Input ", "Field ")) else message


def no_such_route(method: str, path: str, headers: dict[str, str] | None = None) -> NotFound:
    return NotFound(f"there is no such route: {method} {path}", code="unknown_url", headers=headers)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return render(error)


async def _first_answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, AlreadyAnswered)
    return Response(error.answer, media_type="application/json", headers={"idempotent-replayed": "true"})


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place, *rest = first["loc"]
    if first["type"] == "json_invalid":
        return render(BadRequest(f"the body is not valid JSON: {first['ctx']['error']}", code="json_invalid"))
    if place != "body":
        param = ".".join(map(str, rest))
        return render(BadRequest(f"{param}: {_message_of(first)}", code=str(first["type"]), param=param))
    if not rest and "json" not in request.headers.get("content-type", ""):
        return render(BadRequest("send the request as JSON, with the header content-type: application/json", code="invalid_content_type"))
    errors = [{**each, "loc": each["loc"][1:]} for each in error.errors()[:MAX_ERRORS_READ] if each["loc"][0] == "body"]
    return render(bad_request(errors, error.body))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework raises by itself: unknown routes, methods, bodies that can't be read."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.scope['path']}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return render(no_such_route(request.method, request.scope["path"], headers))
    if error.status_code == 405:
        return render(MethodNotAllowed(f"this route does not take this method: {where}", headers=headers))
    if isinstance(error, JsonTooDeep):
        return render(BadRequest(error.detail, code="json_too_deep"))
    if error.status_code == 408:
        return render(RequestTimeout(str(error.detail), headers=headers))
    if error.status_code == 413:
        return render(RequestTooLarge(str(error.detail), headers=headers))
    return render(BadRequest(str(error.detail), headers=headers))
