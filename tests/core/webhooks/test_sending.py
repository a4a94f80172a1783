"""Attempts at real servers, over real TLS: where the connection goes, and what a receiver can't make the sender do."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trustme
from openai import OpenAI

from core.webhooks import addresses, sending
from core.webhooks.events import EVENT_TYPES, new_event_body
from core.webhooks.sending import NotDelivered, send
from core.webhooks.signing import new_secret
from tests.fixtures.webhook_receiver import Receiver, receiving

NAME = "hooks.example.com"
BODY = new_event_body(EVENT_TYPES[0], "ftjob-1")
SECRET = new_secret()
GETADDRINFO = socket.getaddrinfo


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """The sender's, which knows the authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def server_context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def naming(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """NAME has the first answer's addresses when it is first looked up, then the second's, … Returns what was looked up."""
    asked: list[str] = []

    def getaddrinfo(host: str, *arguments: Any, **options: Any) -> Any:
        if host != NAME:
            return GETADDRINFO(host, *arguments, **options)  # an address that is connected to
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [entry for address in found for entry in GETADDRINFO(address, *arguments, **options)]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    return asked


def post(url: str, **options: Any) -> int:
    return send(url, "wh_1", BODY, [SECRET], **({"allow_insecure": True} | options))


def test_receiver_gets_what_the_stock_client_accepts() -> None:
    with receiving(Receiver([201])) as receiver:
        assert post(receiver.url + "?a=b") == 201
    (request,) = receiver.received
    assert request.path == "/hook?a=b"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["webhook-id"] == "wh_1"
    client = OpenAI(api_key="unused", base_url="http://127.0.0.1:1")
    assert client.webhooks.unwrap(request.body, request.headers, secret=SECRET).type == EVENT_TYPES[0]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://hooks.example.com/", "hooks.example.com"),
        ("http://hooks.example.com:80/", "hooks.example.com"),
        ("http://hooks.example.com:{port}/", "hooks.example.com:{port}"),
        ("http://[::1]/", "[::1]"),
        ("http://[::1]:{port}/", "[::1]:{port}"),
    ],
)
def test_host_header(monkeypatch: pytest.MonkeyPatch, url: str, host: str) -> None:
    """Whatever is connected to."""
    with receiving() as receiver:
        create_connection = socket.create_connection
        monkeypatch.setattr(
            socket, "create_connection", lambda _, *arguments, **options: create_connection(("127.0.0.1", receiver.port), *arguments, **options)
        )
        naming(monkeypatch, ["127.0.0.1"])
        assert post(url.format(port=receiver.port)) == 200
        assert receiver.received[0].headers["host"] == host.format(port=receiver.port)


def test_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch, authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """A name whose second lookup gives another address: there is none. The certificate is that of the name, not of the address."""
    asked = naming(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    with receiving(ssl_context=server_context(authority, NAME)) as receiver:
        assert post(f"https://{NAME}:{receiver.port}/hook", ssl_context=trusting) == 200
    (request,) = receiver.received
    assert asked == [NAME]
    assert request.headers["host"] == f"{NAME}:{receiver.port}"
    assert request.server_name == NAME


def test_name_that_turns_private_after_the_check_is_connected_to_as_it_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rules of production. Public addresses can't be reached from a test, so it sees which one would be."""
    naming(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])
    connected: list[str] = []

    def connect(address: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
        connected.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(NotDelivered, match="refused"):
        post(f"https://{NAME}/", allow_insecure=False)
    assert connected == ["8.8.8.8"]
    with pytest.raises(NotDelivered, match="not a public one"):  # now it resolves to 127.0.0.1
        post(f"https://{NAME}/", allow_insecure=False)
    assert connected == ["8.8.8.8"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "https://127.0.0.1:{port}/", "https://localhost:{port}/", "https://[::ffff:127.0.0.1]:{port}/"])
def test_private_addresses_are_not_connected_to(url: str) -> None:
    with receiving() as receiver, pytest.raises(NotDelivered, match=r"https|public|machine"):
        post(url.format(port=receiver.port), allow_insecure=False)
    assert receiver.received == []


def test_next_address_is_tried_where_one_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    naming(monkeypatch, ["::1", "127.0.0.3", "127.0.0.1"])
    with receiving() as receiver:
        assert post(f"http://{NAME}:{receiver.port}/hook") == 200
    assert len(receiver.received) == 1


@pytest.mark.parametrize("names", [["other.example.com"], ["127.0.0.1"]])
def test_certificate_of_another_name_is_refused(monkeypatch: pytest.MonkeyPatch, authority: trustme.CA, trusting: ssl.SSLContext, names: list[str]) -> None:
    naming(monkeypatch, ["127.0.0.1"])
    with receiving(ssl_context=server_context(authority, *names)) as receiver, pytest.raises(NotDelivered, match="Hostname mismatch"):
        post(f"https://{NAME}:{receiver.port}/hook", ssl_context=trusting)
    assert receiver.received == []


def test_certificate_of_an_unknown_authority_is_refused(monkeypatch: pytest.MonkeyPatch, authority: trustme.CA) -> None:
    naming(monkeypatch, ["127.0.0.1"])
    with receiving(ssl_context=server_context(authority, NAME)) as receiver, pytest.raises(NotDelivered, match="CERTIFICATE_VERIFY_FAILED"):
        post(f"https://{NAME}:{receiver.port}/hook")
    assert receiver.received == []


def test_authorities_of_the_operator_are_known(monkeypatch: pytest.MonkeyPatch, authority: trustme.CA, tmp_path: Any) -> None:
    """As SSL_CERT_FILE names them."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr(sending, "_default_ssl_context", sending._default_ssl_context.__wrapped__)
    naming(monkeypatch, ["127.0.0.1"])
    with receiving(ssl_context=server_context(authority, NAME)) as receiver:
        assert post(f"https://{NAME}:{receiver.port}/hook") == 200


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with receiving() as elsewhere, receiving(Receiver([status], {"location": elsewhere.url})) as receiver:
        assert post(receiver.url) == status
    assert elsewhere.received == []


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as proxy, receiving() as receiver:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert post(receiver.url) == 200
    assert (len(receiver.received), len(proxy.received)) == (1, 0)


def test_endless_answer_is_not_read() -> None:
    with receiving(Receiver(body=b"x" * 50_000_000)) as receiver:
        started = time.monotonic()
        assert post(receiver.url) == 200
    assert time.monotonic() - started < 5


@contextmanager
def server_that(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """One that does not speak HTTP as it should."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                connection, _ = listener.accept()
                with connection:
                    handle(connection)
            except OSError:  # the sender or the test has closed it
                return

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}/"


def drip(connection: socket.socket) -> None:
    """A byte now and then, so that no single wait is long."""
    connection.recv(4096)
    for byte in b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


@pytest.mark.parametrize("handle", [drip, lambda connection: time.sleep(5)], ids=["drips", "is silent"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_total_time_is_limited(monkeypatch: pytest.MonkeyPatch, handle: Callable[[socket.socket], None], scheme: str) -> None:
    monkeypatch.setattr(sending, "TOTAL_SECONDS", 1.0)
    with server_that(handle) as address:
        started = time.monotonic()
        with pytest.raises(NotDelivered, match=r"took longer than 1 seconds|connection failed"):
            post(f"{scheme}://{address}")
    assert 0.3 < time.monotonic() - started < 4.5 or scheme == "https"


def test_slow_lookup_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "TOTAL_SECONDS", 0.2)

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.4)
        return GETADDRINFO("127.0.0.1", *arguments[1:], **options)

    monkeypatch.setattr(addresses.socket, "getaddrinfo", slow)
    with receiving() as receiver, pytest.raises(NotDelivered, match="took longer"):
        post(f"http://{NAME}:{receiver.port}/")
    assert receiver.received == []


@pytest.mark.parametrize(
    "answer", [b"", b"nonsense\r\n\r\n", b"n" * 50_000 + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: " + b"a" * 200_000 + b"\r\n\r\n"]
)
def test_answers_that_are_no_http(answer: bytes) -> None:
    """The reason may quote them, but not all of them."""

    def handle(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(answer)

    with server_that(handle) as address, pytest.raises(NotDelivered, match="connection failed") as caught:
        post(f"http://{address}")
    assert len(str(caught.value)) < 400


def test_answer_that_breaks_off_after_its_status_counts() -> None:
    def handle(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nab")

    with server_that(handle) as address:
        assert post(f"http://{address}") == 200


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(NotDelivered, match="refused"):
        post(f"http://127.0.0.1:{port}/")
