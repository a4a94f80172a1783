import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from inference.app import MAX_BODY_BYTES
from tests.inference.serving import BASE, RunningServer, held, wait_until

MakeServer = Callable[..., AbstractContextManager[RunningServer]]
QUESTION = [{"role": "user", "content": "which lamp?"}]
LONG: dict[str, Any] = {"model": BASE, "messages": QUESTION, "max_tokens": 400, "ignore_eos": True}
ROUTES = [("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/load_lora_adapter"), ("GET", "/nowhere")]


def test_health(server: RunningServer) -> None:
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b"{", "not valid JSON", "json_invalid"),
        (b"\x80", "parsing the body", "json_invalid"),
        (b"[" * 100_000, "parsing the body", "json_invalid"),
        (b"[]", "must be a JSON object", "invalid_content_type"),
        (b"", "must be a JSON object", "invalid_content_type"),
        (b"{}", "model: Field required", "missing"),
    ],
)
def test_a_body_that_is_no_request_is_a_400(server: RunningServer, body: bytes, message: str, code: str) -> None:
    answer = server.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == code


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_cut_off(server: RunningServer, chunked: bool) -> None:
    body = b"x" * (MAX_BODY_BYTES + 1)
    answer = server.client.post("/v1/completions", content=iter([body]) if chunked else body, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert "larger than" in answer.json()["error"]["message"]


def test_unknown_routes_and_methods_have_error_bodies(server: RunningServer) -> None:
    for answer, status in ((server.client.get("/v1/nothing"), 404), (server.client.get("/v1/completions"), 405)):
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_health_asks_for_the_key(make_server: MakeServer, method: str, path: str) -> None:
    with make_server(api_key="geheim") as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "geheim"}):
            answer = server.client.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert server.client.request(method, path, headers={"authorization": "Bearer geheim"}).status_code != 401
        assert server.client.get("/health").status_code == 200


def test_a_failing_step_is_a_500_and_the_next_request_works(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_server() as server:
        with monkeypatch.context() as patch:
            patch.setattr(server.engine.model, "logits", lambda hidden: hidden.no_such_thing)
            for stream in (False, True):
                answer = server.post("/v1/chat/completions", model=BASE, messages=QUESTION, stream=stream)
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
                assert "no_such_thing" not in answer.text
            server.post("/v1/completions", model=BASE, prompt="a")
            assert server.client.get("/health").status_code == 503
        assert server.chat(max_tokens=3)["choices"][0]["finish_reason"] in ("length", "stop")
        assert server.client.get("/health").status_code == 200


def test_a_failure_within_a_stream_is_an_error_event(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_server() as server:
        server.slow_down(0.01)
        events = server.stream("/v1/chat/completions", **LONG)
        next(events)
        monkeypatch.setattr(server.engine.model, "logits", lambda hidden: hidden.no_such_thing)
        rest = list(events)
        assert rest[-2]["error"]["code"] == "internal_error"
        assert rest[-1] == "[DONE]"


def test_a_full_queue_is_a_503_that_may_be_retried(make_server: MakeServer) -> None:
    with make_server(max_waiting=1) as server:
        with held(server.engine):
            waiting = threading.Thread(target=server.chat)
            waiting.start()
            wait_until(lambda: server.engine.load == (0, 1))
            answer = server.post("/v1/chat/completions", model=BASE, messages=QUESTION)
        assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "overloaded", "2")
        waiting.join()
        assert server.chat(max_tokens=1)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_frees_its_place(make_server: MakeServer, path: str, stream: bool) -> None:
    with make_server(max_batch=1) as server:
        steps = server.slow_down(0.02)
        with server.raw_request(path, **LONG, prompt="the", stream=stream) as connection:
            wait_until(lambda: server.engine.load == (1, 0))
            if stream:
                assert b"200 OK" in connection.recv(1000)
        wait_until(lambda: server.engine.load == (0, 0))
        assert len(steps) < 300
        assert server.chat(max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_forgotten(make_server: MakeServer, stream: bool) -> None:
    with make_server(max_batch=1) as server:
        steps = server.slow_down(0.02)
        with server.raw_request("/v1/chat/completions", **LONG):
            wait_until(lambda: server.engine.load == (1, 0))
            with server.raw_request("/v1/chat/completions", **LONG, stream=stream):
                wait_until(lambda: server.engine.load == (1, 1))
            wait_until(lambda: server.engine.load == (1, 0))
            assert len(steps) < 300


def test_stopping_ends_streams_with_an_error_not_with_silence(make_server: MakeServer) -> None:
    with make_server() as server:
        server.slow_down(0.02)
        with server.client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.engine.stop()
            events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert events[-1]["error"]["code"] == "overloaded"
