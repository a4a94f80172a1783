"""A small real HTTP server that answers with the wire's shapes, from state that a test sets. For what the API can't be
made to do on demand: damaged downloads, restarts, odd answers."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "sdft_test_key"

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Received:
    method: str
    path: str
    """Still percent-encoded, without the query."""
    query: dict[str, str]
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def json_answer(value: Any, status: int = 200) -> Answer:
    return status, {"content-type": "application/json"}, json.dumps(value).encode()


def refusal(status: int, message: str, code: str | None = None) -> Answer:
    return json_answer({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}, status)


def stream_answer(*events: Any) -> Answer:
    """Server-sent events, as chat completions stream them; a string goes as it is."""
    lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]
    return 200, {"content-type": "text/event-stream"}, "".join(lines).encode()


@dataclass
class StubServer:
    """`routes` maps "METHOD pattern" to what answers; the first match counts."""

    routes: dict[str, Callable[[Received], Answer]] = field(default_factory=dict)
    received: list[Received] = field(default_factory=list)
    port: int = 0
    _server: ThreadingHTTPServer | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """On the port of the last start, so that a test can restart it."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, request: Received) -> Answer:
        self.received.append(request)
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return refusal(401, "Incorrect API key provided")
        for route, respond in self.routes.items():
            method, pattern = route.split(" ", 1)
            if method == request.method and re.fullmatch(pattern, request.path):
                return respond(request)
        return refusal(404, f"no such thing: {request.path}")


def _handler(stub: StubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            address = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(address.query).items()}
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answered, content = stub.answer(Received(self.command, address.path.removeprefix("/v1"), query, body, headers))
            self.send_response(status)
            for name, value in answered.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = respond

        def log_message(self, format: str, *args: Any) -> None:
            return None

    return Handler
