"""A reader of event streams that knows nothing of any client: bytes from a real connection, split at empty lines."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from tests.api.serving import Api

DONE = "[DONE]"


@dataclass(frozen=True)
class Sent:
    """One server-sent event. `data` is None for a comment."""

    id: str | None
    data: str | None

    @property
    def json(self) -> dict[str, Any]:
        assert self.data is not None
        value: dict[str, Any] = json.loads(self.data)
        return value


@contextmanager
def opened(api: Api, job_id: str, last_event_id: str | None = None, timeout: float = 20) -> Iterator[Iterator[Sent]]:
    headers = api.headers | ({} if last_event_id is None else {"last-event-id": last_event_id})
    with (
        httpx2.Client(base_url=api.base_url, headers=headers, timeout=timeout, trust_env=False) as client,
        client.stream("GET", f"/v1/fine_tuning/jobs/{job_id}/events", params={"stream": "true"}) as answer,
    ):
        assert answer.status_code in (200, 204), answer.read()
        assert answer.status_code == 204 or answer.headers["content-type"].startswith("text/event-stream")
        yield parsed(answer.iter_bytes())


def read_all(api: Api, job_id: str, last_event_id: str | None = None) -> list[Sent]:
    """Everything until the stream ends."""
    with opened(api, job_id, last_event_id) as stream:
        return list(stream)


def parsed(chunks: Iterator[bytes]) -> Iterator[Sent]:
    buffered = b""
    for chunk in chunks:
        *complete, buffered = (buffered + chunk).split(b"\n\n")
        for block in complete:
            fields = dict(line.split(": ", 1) for line in block.decode().split("\n"))
            yield Sent(fields.get("id"), fields.get("data"))
    assert buffered == b""
