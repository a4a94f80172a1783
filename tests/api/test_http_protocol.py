"""Bounds on connections: raw sockets against uvicorn with the protocol that the service runs it with."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from api import http_protocol
from api.http_protocol import MAX_HEAD_BYTES, ROOM_FOR_REFUSALS, BoundedHttpProtocol
from tests.api.serving import wait_for

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
RECEIVE_SECONDS = 8


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the size of the body; at once where the address says so."""
    size, more = 0, scope["path"] != "/at-once"
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def served(limit_concurrency: int | None = None) -> Iterator[int]:
    config = uvicorn.Config(application, port=0, lifespan="off", log_level="critical", http=BoundedHttpProtocol, limit_concurrency=limit_concurrency)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served() as number:
        yield number


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=RECEIVE_SECONDS)


def everything(connection: socket.socket) -> bytes:
    """Until the server closes. Raises TimeoutError where it does not."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            received += chunk
    return received


def until(connection: socket.socket, end: bytes) -> bytes:
    """What was received up to this end, which may come in several parts. Raises TimeoutError where it does not."""
    received = b""
    while not received.endswith(end):
        part = connection.recv(65_536)
        assert part, received[:500]
        received += part
    return received


@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (b"GET / HTTP/1.1\r\n", b"x: y\r\n" * 1000),
        (b"GET / HTTP/1.1\r\nx: ", b"y" * 6000),
        (b"GET /", b"y" * 6000),
        (CHUNKED + b"0\r\n", b"x: y\r\n" * 1000),
        (CHUNKED + b"0\r\nx: ", b"y" * 6000),
        (CHUNKED + b"1;", b"y" * 6000),
    ],
    ids=["headers", "one header", "address", "trailers", "one trailer", "chunk extension"],
)
def test_endless_head_ends_the_connection(port: int, beginning: bytes, piece: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(beginning)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(16 * MAX_HEAD_BYTES // len(piece)):
                connection.sendall(piece)
        everything(connection)  # ends, before the time for a head is over


def test_complete_head_that_is_too_large_is_refused(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(REQUEST + b"x: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 400 ")


def test_ordinary_requests_pass_one_after_another_and_pipelined(port: int) -> None:
    body = b"z" * 300_000
    post = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    header = b"x: " + b"y" * 60_000 + b"\r\n"
    chunked = CHUNKED + b"4\r\nabcd\r\n" * 50_000 + b"0\r\n\r\n"
    with connect(port) as connection:
        for request, answer in ((post, b"300000"), (REQUEST + header + b"\r\n", b"0"), (chunked, b"200000")):
            connection.sendall(request)
            assert until(connection, b"\r\n\r\n" + answer)
        connection.sendall((REQUEST + b"\r\n") * 2 + REQUEST + b"connection: close\r\n\r\n")
        assert everything(connection).count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize(
    "sent",
    [b"", REQUEST, REQUEST + b"\r\n" + REQUEST, REQUEST + b"\r\n" + b"\r\n", b"POST /at-once HTTP/1.1\r\ncontent-length: 9\r\n\r\n1"],
    ids=["nothing", "half a request", "half of a second request", "an empty line after a request", "half of a body that was answered"],
)
def test_connection_on_which_no_request_comes_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(http_protocol, "LINGERING_SECONDS", 0.3)
    with served() as port, connect(port) as connection:
        connection.sendall(sent)
        assert everything(connection).count(b"HTTP/1.1 200 OK") == (b"\r\n\r\n" in sent)


def test_body_that_takes_longer_than_a_head_may_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    with served() as port, connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n1")
        threading.Event().wait(0.6)
        connection.sendall(b"2")
        assert until(connection, b"\r\n\r\n2")


def test_connections_beyond_the_limit_are_told_so_and_then_closed_at_once() -> None:
    limit = 4
    with served(limit) as port:
        held = [connect(port) for _ in range(limit)]
        with connect(port) as refused:
            refused.sendall(REQUEST + b"\r\n")
            assert everything(refused).startswith(b"HTTP/1.1 503 ")
        with connect(port) as probe:
            probe.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert everything(probe).startswith(b"HTTP/1.1 200 "), "else a busy process would be ended"
        held += [connect(port) for _ in range(ROOM_FOR_REFUSALS)]
        with connect(port) as closed:
            assert everything(closed) == b""
        for connection in held:
            connection.close()
