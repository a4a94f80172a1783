"""The client against a server that answers what a test tells it to: every status and every way of breaking off."""

import asyncio
import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from core import inference_client
from core.errors import InferenceFailed, InferenceTimeout, InferenceUnavailable
from core.inference_client import AdapterRefused, InferenceClient
from core.settings import Settings

MakeSettings = Callable[..., Settings]


class Server(ThreadingHTTPServer):
    """Answers every request with `status` and `content`; breaks off after `content` where `announced_bytes` is more."""

    status = refusal = 200
    content = b"{}"
    announced_bytes: int | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, Any] | None, str | None]] = []

    def answers(self, status: int, body: Any, announced_bytes: int | None = None) -> None:
        self.status = status
        self.content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.announced_bytes = announced_bytes


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._reply(None)

    def do_DELETE(self) -> None:
        self._reply(None)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"])).decode()
        self._reply({"content": content, "digest": self.headers["content-digest"]})

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _reply(self, body: dict[str, Any] | None) -> None:
        self.server.requests.append((self.path, body, self.headers.get("authorization")))
        self.send_response(self.server.status)
        self.send_header("content-length", str(self.server.announced_bytes or len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(server: Server, make_settings: MakeSettings) -> InferenceClient:
    return InferenceClient(f"http://127.0.0.1:{server.server_port}/", make_settings(inference_api_key="secret"))


@pytest.fixture
def lonely(make_settings: MakeSettings) -> InferenceClient:
    """A client whose server does not exist."""
    return InferenceClient("http://127.0.0.1:1", make_settings())


async def read_stream(client: InferenceClient) -> tuple[int, bytes]:
    async with client.stream("/v1/chat/completions", {"stream": True}) as (status, chunks):
        return status, b"".join([chunk async for chunk in chunks])


def test_health(client: InferenceClient, lonely: InferenceClient, server: Server) -> None:
    assert client.healthy()
    server.answers(503, {})
    assert not client.healthy()
    assert not lonely.healthy()


class OtherKey(Handler):
    """Says that it is well, and refuses whoever asks for anything else."""

    def _reply(self, body: dict[str, Any] | None) -> None:
        self.server.status = 200 if self.path == "/health" else self.server.refusal
        super()._reply(body)


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_refuses_the_key_is_not_healthy_and_is_named(client: InferenceClient, server: Server, status: int) -> None:
    server.RequestHandlerClass, server.refusal = OtherKey, status
    with capture_logs() as logged:
        assert not client.healthy()
        assert not client.healthy()
        for call in (
            lambda: client.load_adapter("a", Path("/a")),
            lambda: client.unload_adapter("a"),
            lambda: client.prompt_logprobs("a", [1, 2]),
            lambda: client.served_dtype("a"),
            client.served_names,
        ):
            with pytest.raises(InferenceFailed, match="refused this service's key: the operator has to set SDFT_INFERENCE_API_KEY"):
                call()
    assert [(line["event"], line["log_level"], line["status"]) for line in logged] == [("inference_key_refused", "error", status)]
    server.refusal = 200
    assert client.healthy()


def test_adapters_are_loaded_by_name_and_path(client: InferenceClient, server: Server) -> None:
    client.load_adapter("a1", Path("/adapters/a1"))
    assert server.requests == [("/v1/load_lora_adapter", {"lora_name": "a1", "lora_path": "/adapters/a1"}, "Bearer secret")]


def test_adapter_that_is_loaded_already_is_fine(client: InferenceClient, server: Server) -> None:
    server.answers(400, {"error": {"message": "The lora adapter 'a1' has already been loaded."}})
    client.load_adapter("a1", Path("/adapters/a1"))


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, {"error": {"message": "rank 512 is too large"}}, "rank 512 is too large"),
        (404, {"message": "no such file"}, "no such file"),
        (500, b"<html>Internal error</html>", "<html>Internal error</html>"),
        (422, ["a", "list"], "a"),
    ],
)
def test_refused_adapter_carries_the_servers_reason(client: InferenceClient, server: Server, status: int, body: Any, message: str) -> None:
    server.answers(status, body)
    with pytest.raises(AdapterRefused, match=message):
        client.load_adapter("a1", Path("/adapters/a1"))


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_server_that_is_busy_or_starting_has_not_refused_the_adapter(client: InferenceClient, server: Server, status: int) -> None:
    server.answers(status, {"error": {"message": "in a moment"}})
    with pytest.raises(InferenceUnavailable, match="in a moment"):
        client.load_adapter("a1", Path("/adapters/a1"))


@pytest.mark.parametrize("status", [200, 400, 404])
def test_unloading_is_idempotent(client: InferenceClient, server: Server, status: int) -> None:
    server.answers(status, {"error": {"message": "not loaded"}})
    client.unload_adapter("a1")


@pytest.fixture
def sender(server: Server, make_settings: MakeSettings) -> InferenceClient:
    """A client whose server sees no disk of ours."""
    return InferenceClient(f"http://127.0.0.1:{server.server_port}", make_settings(inference_api_key="secret", inference_adapters="upload"))


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "a1"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_text("weights")
    (directory / "attestation.json").write_text("of no use to a server")
    return directory


def test_where_disks_are_shared_nothing_is_sent(client: InferenceClient, server: Server, adapter_dir: Path) -> None:
    assert (client.place_adapter(adapter_dir), client.sent_names()) == (str(adapter_dir), set())
    client.remove_adapter("a1")
    assert [path for path, _, _ in server.requests] == ["/v1/unload_lora_adapter"]


def test_an_adapter_is_sent_as_two_files_with_their_hashes(sender: InferenceClient, server: Server, adapter_dir: Path) -> None:
    server.answers(200, {"lora_path": "/there/a1"})
    assert sender.place_adapter(adapter_dir) == "/there/a1"
    digests = [base64.b64encode(hashlib.sha256(content).digest()).decode() for content in (b"{}", b"weights")]
    assert server.requests == [
        ("/adapter_files/a1/adapter_config.json", {"content": "{}", "digest": f"sha-256=:{digests[0]}:"}, "Bearer secret"),
        ("/adapter_files/a1/adapter_model.safetensors", {"content": "weights", "digest": f"sha-256=:{digests[1]}:"}, "Bearer secret"),
    ]
    server.answers(200, {"names": ["a1", "a2"]})
    assert sender.sent_names() == {"a1", "a2"}
    server.requests.clear()
    sender.remove_adapter("a1")
    assert [path for path, _, _ in server.requests] == ["/v1/unload_lora_adapter", "/adapter_files/a1"]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, {"detail": "Not Found"}, InferenceFailed),
        (405, {}, InferenceFailed),
        (401, {}, InferenceFailed),
        (200, {}, InferenceFailed),
        (400, {"error": {"message": "its Content-Digest"}}, AdapterRefused),
        (409, {"error": {"message": "another"}}, AdapterRefused),
        (413, {"error": {"message": "bytes"}}, AdapterRefused),
        (503, {}, InferenceUnavailable),
        (507, {"error": {"message": "the server's disk is full"}}, InferenceUnavailable),
    ],
)
def test_a_server_that_does_not_take_an_adapter(
    sender: InferenceClient, server: Server, adapter_dir: Path, status: int, body: Any, error: type[Exception]
) -> None:
    server.answers(status, body)
    with pytest.raises(error):
        sender.place_adapter(adapter_dir)
    assert len(server.requests) == 1, "what comes after is not sent"


@pytest.mark.parametrize("body", [{}, {"names": None}, {"detail": "Not Found"}])
def test_a_server_that_does_not_say_what_it_was_sent(sender: InferenceClient, server: Server, body: Any) -> None:
    server.answers(404, body)
    with pytest.raises(InferenceFailed, match="takes no adapters over HTTP"):
        sender.sent_names()


def test_removing_that_fails_is_told(sender: InferenceClient, server: Server) -> None:
    server.answers(500, {"error": {"message": "no such luck"}})
    with pytest.raises(AdapterRefused, match="no such luck"):
        sender.remove_adapter("a1")


def test_unloading_that_fails_is_told(client: InferenceClient, server: Server) -> None:
    server.answers(500, {"error": {"message": "broken"}})
    with pytest.raises(AdapterRefused, match="broken"):
        client.unload_adapter("a1")


def test_log_probabilities_are_those_of_the_prompt_alone(client: InferenceClient, server: Server) -> None:
    server.answers(200, {"choices": [{"logprobs": {"token_logprobs": [None, -0.5, -1.5, -9.0]}}]})
    assert client.prompt_logprobs("a1", [5, 6, 7]) == [-0.5, -1.5]
    path, body, _ = server.requests[0]
    assert path == "/v1/completions"
    assert body is not None
    assert (body["model"], body["prompt"], body["echo"], body["temperature"]) == ("a1", [5, 6, 7], True, 0)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, {"error": {"message": "unknown model"}}, AdapterRefused),
        (500, {"error": {"message": "broken"}}, InferenceFailed),
        (200, {"choices": []}, InferenceFailed),
        (200, {"choices": [{"logprobs": None}]}, InferenceFailed),
        (200, {"choices": [{"logprobs": {"token_logprobs": [None, None, -1]}}]}, InferenceFailed),
        (200, b"no json", InferenceFailed),
    ],
)
def test_answers_without_log_probabilities(client: InferenceClient, server: Server, status: int, body: Any, error: type[Exception]) -> None:
    server.answers(status, body)
    with pytest.raises(error):
        client.prompt_logprobs("a1", [5, 6, 7])


def test_the_precision_is_that_of_the_base_model(client: InferenceClient, server: Server) -> None:
    server.answers(200, {"data": [{"id": "other", "dtype": "float32"}, {"id": "base", "dtype": "bfloat16"}]})
    assert client.served_dtype("base") == "bfloat16"


@pytest.mark.parametrize("body", [{"data": [{"id": "base"}]}, {"data": [{"id": "other", "dtype": "float32"}]}, {"data": ["base"]}, {"error": "no"}, b"<html>"])
def test_a_server_need_not_say_its_precision(client: InferenceClient, server: Server, body: Any) -> None:
    server.answers(200, body)
    assert client.served_dtype("base") is None


def test_what_is_served_are_the_base_and_the_adapters_that_are_loaded(client: InferenceClient, server: Server) -> None:
    server.answers(200, {"data": [{"id": "base"}, {"id": "adapter-1"}]})
    assert client.served_names() == {"base", "adapter-1"}


@pytest.mark.parametrize("body", [{"data": []}, {"data": ["base"]}, {"error": "no"}, b"<html>"])
def test_an_answer_that_names_nothing_does_not_mean_that_nothing_is_served(client: InferenceClient, server: Server, body: Any) -> None:
    server.answers(200, body)
    with pytest.raises(InferenceUnavailable):
        client.served_names()


def test_complete_passes_the_answer_on_whatever_its_status(client: InferenceClient, server: Server) -> None:
    server.answers(400, {"error": {"message": "too long"}})
    answer = asyncio.run(client.complete("/v1/chat/completions", {"model": "a1"}))
    assert (answer.status, answer.body) == (400, {"error": {"message": "too long"}})
    assert server.requests == [("/v1/chat/completions", {"model": "a1"}, "Bearer secret")]


def test_stream_passes_the_bytes_on(client: InferenceClient, server: Server) -> None:
    server.answers(200, b"data: 1\n\ndata: [DONE]\n\n")
    assert asyncio.run(read_stream(client)) == (200, b"data: 1\n\ndata: [DONE]\n\n")


def test_stream_that_breaks_off_is_an_error_not_an_end(client: InferenceClient, server: Server) -> None:
    server.answers(200, b"data: 1\n\n", announced_bytes=1000)
    with pytest.raises(InferenceFailed, match="middle of the answer"):
        asyncio.run(read_stream(client))


def test_server_that_is_down_is_a_503(lonely: InferenceClient) -> None:
    for call in (
        lambda: lonely.load_adapter("a", Path("/a")),
        lambda: lonely.unload_adapter("a"),
        lambda: lonely.prompt_logprobs("a", [1, 2]),
        lambda: lonely.served_dtype("a"),
        lonely.served_names,
    ):
        with pytest.raises(InferenceUnavailable) as caught:
            call()
        assert caught.value.status == 503
    with pytest.raises(InferenceUnavailable):
        asyncio.run(lonely.complete("/v1/completions", {}))
    with pytest.raises(InferenceUnavailable):
        asyncio.run(read_stream(lonely))


def test_proxies_of_the_environment_are_not_asked(server: Server, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert InferenceClient(f"http://127.0.0.1:{server.server_port}", make_settings()).healthy()


def test_an_answer_that_takes_too_long_is_not_asked_for_again(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_client, "READ_TIMEOUT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = InferenceClient(f"http://127.0.0.1:{silent.getsockname()[1]}", make_settings())
        for call in (lambda: client.complete("/v1/completions", {}), lambda: read_stream(client)):
            client._async = None  # each has an event loop of its own
            with pytest.raises(InferenceTimeout, match="max_tokens, or stream") as caught:
                asyncio.run(call())
            assert (caught.value.status, caught.value.headers) == (504, {"x-should-retry": "false"})


class SecondRequestBreaks(Handler):
    """Promises to keep its connections, and closes one as soon as it is used again: as where the two cross on the way."""

    protocol_version = "HTTP/1.1"
    answered = False

    def _reply(self, body: dict[str, Any] | None) -> None:
        if self.answered:
            self.close_connection = True
            return
        self.answered = True
        super()._reply(body)


def test_a_connection_that_the_server_closes_between_requests_is_no_error(client: InferenceClient, server: Server) -> None:
    server.RequestHandlerClass = SecondRequestBreaks

    async def ask() -> list[int]:
        completed = [(await client.complete("/v1/completions", {})).status for _ in range(2)]
        return [*completed, (await read_stream(client))[0]]

    assert asyncio.run(ask()) == [200, 200, 200]
    assert client.healthy()
    assert client.healthy()
