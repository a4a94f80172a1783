"""The outermost layer of every request: its id, its log line, its measurements, and the last place that catches an error."""

import time

import structlog
from prometheus_client import Counter, Histogram
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.error_handlers import render
from core.errors import ServiceError
from core.ids import new_id
from core.logging import get_logger

log = get_logger(__name__)
requests_total = Counter("sdft_http_requests", "Requests answered.", ["method", "route", "status"])
request_seconds = Histogram("sdft_http_request_seconds", "Time until the whole answer was sent.", ["method", "route"])

CLIENT_CLOSED_REQUEST = 499
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestContext:
    """Gives each request an id, bound to its log lines and sent back as `x-request-id`; turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id("req")
        scope.setdefault("state", {}).update(request_id=request_id, arrived_at=time.monotonic())
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                status = CLIENT_CLOSED_REQUEST
            except Exception:
                log.exception("unexpected_error", method=scope["method"], path=scope["path"])
                if status:  # the answer has begun: all that is left is to break it off
                    raise
                await render(ServiceError("the server had an internal error; its log says more under this request's id"))(scope, receive, send_with_id)
            finally:
                _record(scope, status, time.perf_counter() - started)


def _record(scope: Scope, status: int, seconds: float) -> None:
    route = getattr(scope.get("route"), "path", "unknown")
    method = scope["method"] if scope["method"] in METHODS else "other"
    requests_total.labels(method, route, status).inc()
    request_seconds.labels(method, route).observe(seconds)
    log.info("request", method=method, path=scope["path"], status=status, milliseconds=round(1000 * seconds, 1))
