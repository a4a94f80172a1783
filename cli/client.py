"""The wire: requests to the server, and its errors as exceptions. Nothing else of this package speaks HTTP."""

import ipaddress
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import quote

import httpx2

from cli.errors import CliError, ServerRefused, ServerUnreachable

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 120
ANSWER_TIMEOUT_SECONDS = 600
"""Between two pieces of a model's answer."""

PAGE_SIZE = 100

HINTS = {
    "model_not_found": "see `sdft models list`",
    "unknown_url": "does the base URL end in /v1?",
    "api_key_not_found": "see `sdft keys list`",
}
"""What the server's error codes mean to someone at the command line, added to the server's message."""

Json = dict[str, Any]


class Client:
    """One server, one key. Every call raises ServerRefused with the server's message, or ServerUnreachable."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url = base_url.rstrip("/")
        try:
            host = httpx2.URL(self.base_url).host
            self._http = httpx2.Client(
                headers={"authorization": f"Bearer {api_key}"},
                timeout=httpx2.Timeout(READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS),
                trust_env=not _is_local(host),  # a proxy can't reach this machine's own addresses
            )
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise CliError(f"the base URL or the API key isn't valid: {error}") from error

    @classmethod
    def from_environment(cls) -> "Client":
        """SDFT_BASE_URL and SDFT_API_KEY, else OPENAI_BASE_URL and OPENAI_API_KEY, else a server on this machine."""
        base_url = os.environ.get("SDFT_BASE_URL") or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
        api_key = os.environ.get("SDFT_API_KEY") or os.environ.get("OPENAI_API_KEY")
        if not api_key:
            raise CliError("no API key: set SDFT_API_KEY or OPENAI_API_KEY (the server's first key is in admin.key in its data directory)")
        return cls(base_url, api_key.strip())

    def get(self, path: str, **params: Any) -> Json:
        return self._json("GET", path, params=params)

    def post(self, path: str, body: Json | None = None) -> Json:
        return self._json("POST", path, json=body) if body is not None else self._json("POST", path)

    def delete(self, path: str) -> Json:
        return self._json("DELETE", path)

    def upload(self, path: str, name: str, file: IO[bytes], fields: dict[str, str]) -> Json:
        return self._json("POST", path, files={"file": (name, file)}, data=fields)

    def pages(self, path: str, limit: int | None, **params: Any) -> Iterator[Json]:
        """Items of a list, page by page, up to `limit` in all (None: all)."""
        left, after = limit, None
        while left is None or left > 0:
            size = PAGE_SIZE if left is None else min(left, PAGE_SIZE)
            page = self.get(path, **params, limit=size, **({"after": after} if after else {}))
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]
            left = None if left is None else left - len(page["data"])

    @contextmanager
    def download(self, path: str, **params: Any) -> Iterator[httpx2.Response]:
        """An answer whose body is still to be read."""
        with self._translated(), self._http.stream("GET", self.base_url + path, params=params) as answer:
            _raise_for_error(answer)
            yield answer

    def stream_events(self, path: str, request: Json) -> Iterator[Json]:
        """The JSON objects of a server-sent event stream, up to `[DONE]`."""
        timeout = httpx2.Timeout(ANSWER_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS)
        with self._translated(), self._http.stream("POST", self.base_url + path, json=request, timeout=timeout) as answer:
            _raise_for_error(answer)
            for event in httpx2.EventSource(answer):
                if event.data == "[DONE]":
                    return
                try:
                    body = json.loads(event.data)
                except ValueError as error:
                    raise CliError(f"{self.base_url} sent something that is no JSON: {event.data[:200]}") from error
                if "error" in body:
                    raise _refusal(body, answer.status_code)
                yield body
        raise ServerUnreachable(f"{self.base_url} closed the connection before the answer was complete")

    def _json(self, method: str, path: str, **request: Any) -> Json:
        with self._translated():
            answer = self._http.request(method, self.base_url + path, **request)
            _raise_for_error(answer)
            try:
                body = answer.json()
            except ValueError:
                body = None
        if not isinstance(body, dict):
            raise CliError(f"{self.base_url} answered {answer.status_code} with something that is no JSON object; is it the service's /v1 address?")
        return body

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise ServerUnreachable(f"{self.base_url} can't be reached ({error}); is the service running? `sdft up` starts it") from error
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise CliError(f"{self.base_url} isn't a usable base URL: {error}") from error
        except httpx2.HTTPError as error:
            raise ServerUnreachable(f"{self.base_url}: the connection broke: {error or type(error).__name__}") from error


def segment(identifier: str) -> str:
    """An id as one segment of a path: model ids contain slashes and colons."""
    return quote(identifier, safe="")


def _raise_for_error(answer: httpx2.Response) -> None:
    if answer.status_code < 400:
        return
    answer.read()
    try:
        body = answer.json()
    except ValueError:
        body = None
    raise _refusal(body, answer.status_code)


def _refusal(body: Any, status: int) -> ServerRefused:
    error = body.get("error") if isinstance(body, dict) else None
    message, code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (error, None)
    text = str(message) if message else f"the server answered {status}"
    hint = HINTS.get(str(code))
    return ServerRefused(f"{text.rstrip('.')}; {hint}" if hint else text, status, str(code) if code else None)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
