"""One attempt at a webhook: one POST to an address that was checked, within a total time, without redirects or proxies."""

import contextlib
import ssl
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import httpcore2
import httpx2

from core.webhooks.addresses import Address, Target, UrlRefused, parse_target, public_addresses
from core.webhooks.signing import signed_headers

TOTAL_SECONDS = 10.0
"""For looking up the name, connecting, sending and the answer together."""
ANSWER_BYTES = 4096
"""What is read of an answer's body, so that a receiver is not cut off while it writes a short one."""
MAX_REASON_LENGTH = 300
USER_AGENT = "sdft-webhooks/1"


class NotDelivered(Exception):
    """There was no answer. Carries why, for the endpoint's owner."""


def send(url: str, webhook_id: str, body: str, secrets: Sequence[str], *, allow_insecure: bool, ssl_context: ssl.SSLContext | None = None) -> int:
    """POST the body, signed now by each of the secrets. Returns the answer's HTTP status, whatever it is. Raises NotDelivered."""
    deadline = time.monotonic() + TOTAL_SECONDS
    headers = {"content-type": "application/json", "user-agent": USER_AGENT, **signed_headers(webhook_id, body, secrets, int(time.time()))}
    try:
        target = parse_target(url, allow_insecure=allow_insecure)
        addresses = public_addresses(target, allow_insecure=allow_insecure)
        return _post(target, addresses, headers, body.encode(), deadline, ssl_context or _default_ssl_context())
    except UrlRefused as error:
        raise NotDelivered(str(error)) from error
    except httpcore2.TimeoutException as error:
        raise NotDelivered(f"it took longer than {TOTAL_SECONDS:.0f} seconds") from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        reason = str(error)[:MAX_REASON_LENGTH] or type(error).__name__  # may quote what the endpoint sent
        raise NotDelivered(f"the connection failed: {reason}") from error


def _post(target: Target, addresses: list[Address], headers: dict[str, str], body: bytes, deadline: float, ssl_context: ssl.SSLContext) -> int:
    """httpcore alone, which follows no redirect and knows no proxy: the certificate is checked for the name, and the connection
    goes where `_PinnedBackend` says."""
    url = httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
    host = f"[{target.host}]" if ":" in target.host else target.host
    headers = {"host": host if target.has_default_port else f"{host}:{target.port}", **headers}
    with (
        httpcore2.ConnectionPool(ssl_context=ssl_context, network_backend=_PinnedBackend(addresses, deadline)) as pool,
        pool.stream("POST", url, headers=list(headers.items()), content=body) as answer,
    ):
        received_bytes = 0
        with contextlib.suppress(httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):  # the status has said it all
            for chunk in answer.iter_stream():
                received_bytes += len(chunk)
                if received_bytes >= ANSWER_BYTES:
                    break
        return answer.status


@lru_cache
def _default_ssl_context() -> ssl.SSLContext:
    """This machine's certificate authorities, or those that SSL_CERT_FILE names."""
    return httpx2.create_ssl_context()


class _PinnedBackend(httpcore2.SyncBackend):
    """Connects to the first of the addresses that answers, whatever host it is asked for."""

    def __init__(self, addresses: list[Address], deadline: float) -> None:
        self._addresses = addresses
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        for position, address in enumerate(self._addresses):
            seconds = _seconds_left(self._deadline, httpcore2.ConnectTimeout) / (len(self._addresses) - position)
            try:
                return _StreamWithDeadline(super().connect_tcp(str(address), port, seconds, local_address, socket_options), self._deadline)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if position == len(self._addresses) - 1:
                    raise
        raise httpcore2.ConnectError("there is no address")


class _StreamWithDeadline(httpcore2.NetworkStream):
    """Each operation has the time that is left, however little the other side sends at a time."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _seconds_left(self._deadline, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _seconds_left(self._deadline, httpcore2.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None) -> httpcore2.NetworkStream:
        seconds = _seconds_left(self._deadline, httpcore2.ConnectTimeout)
        return _StreamWithDeadline(self._stream.start_tls(ssl_context, server_hostname, seconds), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _seconds_left(deadline: float, timeout: type[httpcore2.TimeoutException]) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise timeout("no time is left")
    return left
