"""HTTP/1.1 over connections that are kept, as cheap as it can be: the load generator shares the machine with what it measures."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_SECONDS = 60


@dataclass
class Tally:
    """What a row's requests came to: seconds of those that succeeded, and errors by kind."""

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    wall_seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return len(self.seconds) / self.wall_seconds if self.wall_seconds else 0.0


@dataclass(frozen=True)
class Request:
    """`content` is what the body of a good answer holds."""

    wire: bytes
    content: bytes = b""
    status: int = 200


def wire_of(method: str, path: str, key: str, body: Any = None, more: str = "") -> bytes:
    """A request as bytes. `body`: JSON; `more`: further header lines, each with its line end."""
    payload = b"" if body is None else json.dumps(body).encode()
    kind = f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n" if method == "POST" else ""
    return f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n{kind}{more}\r\n".encode() + payload


class Connection:
    """One connection, opened at its first request and again after a failure."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, wire: bytes) -> tuple[int, bytes]:
        """Status and body. Raises OSError, TimeoutError, asyncio.IncompleteReadError."""
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                if self._streams is None:
                    self._streams = await asyncio.open_connection(*self._address)
                reader, writer = self._streams
                writer.write(wire)
                status, headers = read_head(await reader.readuntil(b"\r\n\r\n"))
                body = await read_chunks(reader) if b"transfer-encoding: chunked" in headers else await reader.readexactly(content_length(headers))
        except BaseException:
            self.close()
            raise
        if b"connection: close" in headers:
            self.close()
        return status, body

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def read_head(head: bytes) -> tuple[int, bytes]:
    """Status, and the headers in small letters."""
    return int(head[9:12]), head.lower()


def content_length(headers: bytes) -> int:
    _, found, rest = headers.partition(b"\r\ncontent-length: ")
    return int(rest[: rest.index(b"\r\n")]) if found else 0


async def read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return body


async def closed_loop(address: tuple[str, int], connections: int, seconds: float, requests: Callable[[int], Iterator[Request]]) -> Tally:
    """As many requests as `connections` get answered in `seconds`, each sending its next one when it has its answer. `requests` gives
    a connection's, by its number."""
    tally, began = Tally(), time.perf_counter()
    until = began + seconds

    async def client(number: int) -> None:
        connection = Connection(address)
        for request in requests(number):
            if (sent := time.perf_counter()) >= until:
                break
            await ask_once(connection, request, tally, sent)
        connection.close()

    await asyncio.gather(*(client(number) for number in range(connections)))
    tally.wall_seconds = time.perf_counter() - began
    return tally


async def ask_once(connection: Connection, request: Request, tally: Tally, sent: float) -> bytes | None:
    """The body of a good answer; None where there was none, which is counted."""
    try:
        status, body = await connection.ask(request.wire)
    except (OSError, EOFError, ValueError) as error:  # a timeout is an OSError, half an answer an EOFError, an odd head a ValueError
        tally.errors[type(error).__name__] += 1
        return None
    if status != request.status:
        tally.errors[f"status {status}"] += 1
    elif request.content not in body:
        tally.errors["another answer"] += 1
    else:
        tally.seconds.append(time.perf_counter() - sent)
        return body
    return None
