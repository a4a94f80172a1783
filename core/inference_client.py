"""The one client for an inference server, be it `inference/` or vLLM: the surface is the same.

Calls that stream are asynchronous (they run inside the API's event loop); loading and scoring are synchronous (they run
in worker threads).
"""

import base64
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from core.errors import InferenceFailed, InferenceTimeout, InferenceUnavailable
from core.logging import get_logger
from core.settings import Settings

CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 600
LOAD_TIMEOUT_SECONDS = 120
UNLOAD_TIMEOUT_SECONDS = 20
FILES_PATH = "/adapter_files"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""PEFT's names; all that a server needs."""
SCORE_TIMEOUT_SECONDS = 60
KEY_REFUSED = "the inference server refused this service's key: the operator has to set SDFT_INFERENCE_API_KEY"
TAKES_NO_FILES = "the inference server takes no adapters over HTTP: the operator has to give it a directory for them, or set SDFT_INFERENCE_ADAPTERS=shared"
UNREACHABLE = "the inference server can't be reached; try again in a moment"

LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
"""Every request has a connection of its own: the server may close a kept one, after an error say, just as it is used again, and
a new one costs nothing beside a generation. How many run at a time is the server's affair, which queues what is too much."""
KEY_REFUSED_STATUSES = (401, 403)
PASSING_STATUSES = (408, 429, 502, 503, 504, 507)
"""Of a server that is busy, starting or without room, or of a proxy before one that is away: nothing is wrong with the adapter."""


log = get_logger(__name__)


class AdapterRefused(Exception):
    """The inference server can't load or doesn't know this adapter. Carries its own message."""


@dataclass(frozen=True)
class InferenceAnswer:
    """A finished answer: the server's status and JSON body."""

    status: int
    body: dict[str, Any]


class InferenceClient:
    """Speaks to the server at `url`, with the settings' key. Safe for several threads; one event loop.

    `in_flight` counts the answers that are awaited; `is_down`: when it was last asked for an answer, it could not be reached or said
    that it can't work; `sends_files`: the server reads no directory of this machine.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        key = settings.inference_api_key
        headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        timeout = httpx2.Timeout(READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS)
        self.url = self._base_url = url.rstrip("/")
        self.in_flight = 0
        self.is_down = False
        self.sends_files = settings.inference_adapters == "upload"
        self._key_refused = False
        self._headers = headers
        self._timeout = timeout
        self._sync = httpx2.Client(base_url=self._base_url, headers=headers, timeout=timeout, limits=LIMITS, trust_env=False)
        self._async: httpx2.AsyncClient | None = None

    def healthy(self, timeout_seconds: float = 2) -> bool:
        """Whether it says that it is well, and answers to this service's key: /health needs none."""
        try:
            health, models = (self._sync.get(path, timeout=timeout_seconds) for path in ("/health", "/v1/models"))
            self._require_key_taken(models)
        except (httpx2.HTTPError, InferenceFailed):
            return False
        return health.status_code == models.status_code == 200

    def place_adapter(self, adapter_dir: Path) -> str:
        """Where the server finds this adapter: in the same directory, or in one of its own, which the files are sent to now, under the
        directory's name. Raises as `load_adapter` does, and InferenceFailed where it takes no files."""
        path = str(adapter_dir)
        if self.sends_files:
            for name in ADAPTER_FILES:
                path = self._send(adapter_dir / name)
        return path

    def _send(self, file: Path) -> str:
        with file.open("rb") as content:
            digest = base64.b64encode(hashlib.file_digest(content, "sha256").digest()).decode()
            content.seek(0)
            headers = {"content-digest": f"sha-256=:{digest}:"}
            answer = self._ask("PUT", f"{FILES_PATH}/{file.parent.name}/{file.name}", LOAD_TIMEOUT_SECONDS, content=content, headers=headers)
        if answer.status_code in (404, 405):
            raise InferenceFailed(TAKES_NO_FILES)
        self._require_taken(answer, "take adapters")
        path = _json_of(answer).get("lora_path")
        if not isinstance(path, str):
            raise InferenceFailed(TAKES_NO_FILES)
        return path

    def load_adapter(self, serving_name: str, adapter_path: Path | str) -> None:
        """From where `place_adapter` says. Idempotent. Raises AdapterRefused with the server's reason, InferenceUnavailable where it can't
        be reached, InferenceFailed where it refuses the key."""
        answer = self._post("/v1/load_lora_adapter", {"lora_name": serving_name, "lora_path": str(adapter_path)}, LOAD_TIMEOUT_SECONDS)
        if answer.status_code != 400 or "already" not in answer.text:
            self._require_taken(answer, "load adapters")

    def unload_adapter(self, serving_name: str) -> None:
        """Idempotent: an adapter that is not loaded is no error. Raises as `load_adapter` does."""
        answer = self._post("/v1/unload_lora_adapter", {"lora_name": serving_name}, UNLOAD_TIMEOUT_SECONDS)
        if answer.status_code not in (200, 400, 404):
            raise AdapterRefused(_message_of(answer))

    def remove_adapter(self, serving_name: str) -> None:
        """Unload it, and have the files removed that were sent under this name. Idempotent. Raises as `load_adapter` does."""
        self.unload_adapter(serving_name)
        if self.sends_files:
            answer = self._ask("DELETE", f"{FILES_PATH}/{serving_name}", UNLOAD_TIMEOUT_SECONDS)
            if answer.status_code not in (200, 404, 405):
                raise AdapterRefused(_message_of(answer))

    def sent_names(self) -> set[str]:
        """Under which the server has files that it was sent. Raises InferenceUnavailable, or InferenceFailed where the key is refused or
        it takes no files."""
        if not self.sends_files:
            return set()
        answer = self._ask("GET", FILES_PATH, UNLOAD_TIMEOUT_SECONDS)
        if answer.status_code in PASSING_STATUSES:
            raise InferenceUnavailable(f"the inference server can't say what it was sent ({answer.status_code}): {_message_of(answer)}")
        names = _json_of(answer).get("names")
        if not isinstance(names, list):
            raise InferenceFailed(TAKES_NO_FILES)
        return {str(name) for name in names}

    def prompt_logprobs(self, model: str, token_ids: list[int]) -> list[float]:
        """Natural log-probabilities of `token_ids[1:]`, each given what stands before it.

        Raises AdapterRefused on a 404, InferenceUnavailable, and InferenceFailed on any other answer than log-probabilities.
        """
        request = {"model": model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        answer = self._post("/v1/completions", request, SCORE_TIMEOUT_SECONDS)
        if answer.status_code == 404:
            raise AdapterRefused(_message_of(answer))
        if answer.status_code != 200:
            raise InferenceFailed(f"the inference server answered {answer.status_code}: {_message_of(answer)}")
        try:
            return [float(value) for value in answer.json()["choices"][0]["logprobs"]["token_logprobs"][1 : len(token_ids)]]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InferenceFailed("the inference server's answer holds no log-probabilities of the prompt") from error

    def served_dtype(self, base_model: str) -> str | None:
        """The precision that the server computes in, where it says so: `inference/` does, vLLM does not. Raises InferenceUnavailable,
        or InferenceFailed where the key is refused."""
        dtypes = [card.get("dtype") for card in self._model_cards() if card.get("id") == base_model]
        return str(dtypes[0]) if dtypes and dtypes[0] else None

    def served_names(self) -> set[str]:
        """The base model, and the adapters that are loaded at the moment. Raises InferenceUnavailable, also where the answer names none,
        or InferenceFailed where the key is refused."""
        names = {str(card["id"]) for card in self._model_cards() if card.get("id")}
        if not names:
            raise InferenceUnavailable("the inference server does not say what it serves")
        return names

    def _model_cards(self) -> list[dict[str, Any]]:
        try:
            answer = self._sync.get("/v1/models", timeout=httpx2.Timeout(SCORE_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS))
        except httpx2.HTTPError as error:
            raise InferenceUnavailable(UNREACHABLE) from error
        self._require_key_taken(answer)
        cards = _json_of(answer).get("data")
        return [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []

    def _post(self, path: str, body: dict[str, Any], timeout_seconds: float) -> httpx2.Response:
        return self._ask("POST", path, timeout_seconds, json=body)

    def _ask(self, method: str, path: str, timeout_seconds: float, **content: Any) -> httpx2.Response:
        try:
            answer = self._sync.request(method, path, timeout=httpx2.Timeout(timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS), **content)
        except httpx2.HTTPError as error:
            raise InferenceUnavailable(UNREACHABLE) from error
        self._require_key_taken(answer)
        return answer

    def _require_taken(self, answer: httpx2.Response, what: str) -> None:
        if answer.status_code in PASSING_STATUSES:
            raise InferenceUnavailable(f"the inference server can't {what} at the moment ({answer.status_code}): {_message_of(answer)}")
        if answer.status_code != 200:
            raise AdapterRefused(_message_of(answer))

    def _require_key_taken(self, answer: httpx2.Response) -> None:
        refused, before = answer.status_code in KEY_REFUSED_STATUSES, self._key_refused
        self._key_refused = refused
        if refused:
            if not before:  # not again with every look at a server's health
                log.error("inference_key_refused", url=self.url, status=answer.status_code)
            raise InferenceFailed(KEY_REFUSED)

    async def complete(self, path: str, body: dict[str, Any]) -> InferenceAnswer:
        """POST a request that does not stream. `path` is /v1/chat/completions or /v1/completions.

        Raises InferenceUnavailable, or InferenceTimeout where the answer takes longer than READ_TIMEOUT_SECONDS.
        """
        with self._counted():
            answer = await self._asynchronous().post(path, json=body)
            self.is_down = answer.status_code >= 500
        return InferenceAnswer(answer.status_code, _json_of(answer))

    @asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """POST a request that streams: its status and its bytes as they come. Leaving the block cancels the request.

        Raises InferenceUnavailable or InferenceTimeout before the first byte, InferenceFailed where the bytes end too early.
        """
        request = self._asynchronous().build_request("POST", path, json=body)
        with self._counted():
            answer = await self._asynchronous().send(request, stream=True)
            self.is_down = answer.status_code >= 500
        self.in_flight += 1
        try:
            yield answer.status_code, _bytes_of(answer)
        finally:
            self.in_flight -= 1
            await answer.aclose()

    async def answers(self, timeout_seconds: float = 2) -> bool:
        """Whether it is there; it counts as up then."""
        try:
            self.is_down = (await self._asynchronous().get("/health", timeout=timeout_seconds)).status_code != 200
        except httpx2.HTTPError:
            self.is_down = True
        return not self.is_down

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """One request in flight. Raises InferenceUnavailable or InferenceTimeout in place of httpx's errors."""
        self.in_flight += 1
        try:
            yield
        except httpx2.ReadTimeout as error:
            raise InferenceTimeout(f"the inference server took longer than {READ_TIMEOUT_SECONDS} seconds; set max_tokens, or stream the answer") from error
        except httpx2.HTTPError as error:
            self.is_down = True
            raise InferenceUnavailable(UNREACHABLE) from error
        finally:
            self.in_flight -= 1

    def _asynchronous(self) -> httpx2.AsyncClient:
        if self._async is None:
            self._async = httpx2.AsyncClient(base_url=self._base_url, headers=self._headers, timeout=self._timeout, limits=LIMITS, trust_env=False)
        return self._async

    async def aclose(self) -> None:
        if self._async is not None:
            await self._async.aclose()
        self._sync.close()


async def _bytes_of(answer: httpx2.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_bytes():
            yield chunk
    except httpx2.HTTPError as error:
        raise InferenceFailed("the connection to the inference server broke in the middle of the answer") from error


def _json_of(answer: httpx2.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = {"error": {"message": answer.text[:500]}}
    return body if isinstance(body, dict) else {"error": {"message": str(body)[:500]}}


def _message_of(answer: httpx2.Response) -> str:
    body = _json_of(answer)
    error = body.get("error")
    return str(error.get("message")) if isinstance(error, dict) else str(body.get("message") or body)[:500]
