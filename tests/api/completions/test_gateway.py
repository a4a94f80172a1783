import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from core.tables.jobs import Job
from core.tables.models import Model
from tests.api.inference_stub import WORDS, InferenceStub, event
from tests.api.model_rows import add_model
from tests.api.serving import Api, wait_for
from tests.api.test_errors import assert_error

PUBLIC = "ft:tiny:default:lamps:1"
TEXT = "".join(WORDS)
HELLO: Any = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


@pytest.fixture
def http(live_api: Api) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=live_api.base_url, headers=live_api.headers, timeout=20) as client:
        yield client


@pytest.fixture
def tuned(live_api: Api) -> Model:
    return add_model(live_api, PUBLIC)


def body(model: str = "tiny", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": HELLO, **fields}


def events_of(answer: httpx2.Response) -> list[Any]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


def test_chat_with_the_base_model(live_api: Api, inference: InferenceStub) -> None:
    answer = live_api.openai.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=5, user="me")
    assert answer.choices[0].message.content == TEXT
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert inference.chats == [{"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 5}]


def test_chat_with_a_tuned_model_loads_its_adapter_once(live_api: Api, inference: InferenceStub, tuned: Model) -> None:
    for _ in range(2):
        answer = live_api.openai.chat.completions.create(model=PUBLIC, messages=HELLO)
        assert (answer.model, answer.choices[0].message.content) == (PUBLIC, TEXT)
    directory = live_api.settings.served_adapters_dir / tuned.serving_name
    assert inference.load_paths == [str(directory)] * 2
    assert {path.name for path in Path(directory).iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "attestation.json"}
    assert [chat["model"] for chat in inference.chats] == [tuned.serving_name] * 3


@pytest.mark.parametrize(("trained_at", "asked", "expected"), [(0.5, None, 0.5), (0.5, 0, 0), (0.5, 1.5, 1.5), ("auto", None, None), (None, None, None)])
def test_a_tuned_model_answers_at_the_temperature_it_was_trained_at(
    http: httpx2.Client, live_api: Api, inference: InferenceStub, tuned: Model, trained_at: Any, asked: float | None, expected: float | None
) -> None:
    with live_api.database.transaction() as session:
        session.get_one(Job, tuned.job_id).resolved_hyperparameters = {"n_epochs": 1} | ({} if trained_at is None else {"temperature": trained_at})
    answer = http.post(CHAT, json=body(PUBLIC, **({} if asked is None else {"temperature": asked})))
    assert answer.status_code == 200
    assert inference.chats[-1].get("temperature") == expected


def test_streamed_chat(live_api: Api, inference: InferenceStub, tuned: Model) -> None:
    stream = live_api.openai.chat.completions.create(model=PUBLIC, messages=HELLO, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert {chunk.model for chunk in chunks} == {PUBLIC}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert len(inference.load_paths) == 2


def test_framing_of_a_stream(http: httpx2.Client, tuned: Model) -> None:
    answer = http.post(CHAT, json=body(PUBLIC, stream=True))
    *chunks, done = events_of(answer)
    assert done == "[DONE]"
    assert len(chunks) == len(WORDS)
    assert answer.headers["x-request-id"].startswith("req-")
    assert tuned.serving_name not in answer.text


def test_chunks_arrive_while_the_answer_is_made(live_api: Api, inference: InferenceStub) -> None:
    inference.endless = True
    with live_api.openai.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream:
        assert next(iter(stream)).choices[0].delta.content == WORDS[0]
        assert inference.running == 1


def test_completions(live_api: Api, http: httpx2.Client, inference: InferenceStub, tuned: Model) -> None:
    answer = live_api.openai.completions.create(model=PUBLIC, prompt=[1, 2, 3], logprobs=1, echo=True, max_tokens=1)
    assert (answer.model, answer.choices[0].text) == (PUBLIC, TEXT)
    assert inference.chats[-1] == {"model": tuned.serving_name, "prompt": [1, 2, 3], "logprobs": 1, "echo": True, "max_tokens": 1}
    assert [chunk.choices[0].text for chunk in live_api.openai.completions.create(model=PUBLIC, prompt="x", stream=True)] == list(WORDS)
    assert_error(http.post("/v1/completions", json={"model": "tiny", "prompt": [[]], "suffix": "x"}), 400, "unsupported_parameter", "suffix")


def test_models_that_are_not_served(live_api: Api, http: httpx2.Client, inference: InferenceStub, tuned: Model) -> None:
    add_model(live_api, "ft:tiny:default:unverified:1", status="unverified")
    add_model(live_api, "ft:tiny:default:deleted:1", status="deleted")
    add_model(live_api, "ft:tiny:other:x:1", project_id=live_api.other_project_id)
    names = ["gpt-4o", "/models/tiny", tuned.serving_name, "ft:tiny:default:unverified:1", "ft:tiny:default:deleted:1", "ft:tiny:other:x:1", "", "../tiny"]
    for name in names:
        for stream in (False, True):
            assert_error(http.post(CHAT, json=body(name, stream=stream)), 404, "model_not_found", "model")
    assert inference.chats == []


def test_a_model_that_is_not_served_says_why(live_api: Api, http: httpx2.Client) -> None:
    reason = "the served adapter differs from the trained one by 0.2 nats, more than 0.05"
    differs = add_model(live_api, "ft:tiny:default:differs:1", status="unverified", attestation={"matched": False, "reason": reason})
    add_model(live_api, "ft:tiny:default:waits:1", status="unverified")
    said = assert_error(http.post(CHAT, json=body(differs.id)), 404, "model_not_found", "model")
    assert reason in said
    assert f"see the events of its job {differs.job_id}, or `sdft models get`" in said
    said = assert_error(http.post(CHAT, json=body("ft:tiny:default:waits:1")), 404, "model_not_found", "model")
    assert "were not compared with the trainer's yet" in said


def test_refused_fields_are_named(http: httpx2.Client, inference: InferenceStub) -> None:
    for name in ("functions", "web_search_options", "moderation", "audio", "prediction"):
        assert name in assert_error(http.post(CHAT, json=body(**{name: [{"name": "f"}]})), 400, "unsupported_parameter", name)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]
    assert_error(http.post(CHAT, json=body() | {"messages": image}), 400, "unsupported_content", "messages.0.content")
    assert_error(http.post(CHAT, json={"model": "tiny"}), 400, "missing", "messages")
    assert_error(http.post(CHAT, json=body(temperature=3)), 400, "less_than_equal", "temperature")
    assert inference.chats == []


def misbehave(status: int, content: Any) -> Any:
    def answer(request: Request) -> Response:
        return content if isinstance(content, Response) else JSONResponse(content, status)

    return answer


UPSTREAM_ERRORS: list[tuple[int, Any, int, str | None, str | None, str]] = [
    # status and body of the inference server; then ours: status, code, param and words of the message
    (400, {"error": {"message": "NAME: 9 tokens are too many", "param": "messages", "code": "too_many"}}, 400, "too_many", "messages", PUBLIC),
    (400, {"object": "error", "message": "temperature is odd", "param": None, "code": 400}, 400, "invalid_value", None, "odd"),
    (422, {"error": {"message": "odd", "param": "stop"}}, 400, "invalid_value", "stop", "odd"),
    (400, {"error": {"message": "odd", "param": "x" * 9_000}}, 400, "invalid_value", "x" * 100 + "…", "odd"),
    (413, {"error": {"message": "large"}}, 413, "request_too_large", None, "large"),
    (429, {"error": {"message": "busy"}}, 503, "inference_unavailable", None, "busy"),
    (503, {"error": {"message": "NAME is loading"}}, 503, "inference_unavailable", None, PUBLIC),
    (500, {"error": {"message": "out of memory"}}, 502, "inference_failed", None, "out of memory"),
    (401, {"error": "Unauthorized"}, 502, "inference_failed", None, "refused this service's key: the operator has to set SDFT_INFERENCE_API_KEY"),
    (403, {"error": {"message": "Invalid API key"}}, 502, "inference_failed", None, "SDFT_INFERENCE_API_KEY"),
    (500, PlainTextResponse("Internal Server Error", 500), 502, "inference_failed", None, "Internal Server Error"),
    (418, [], 502, "inference_failed", None, "418"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_inference_server(http: httpx2.Client, inference: InferenceStub, tuned: Model, stream: bool) -> None:
    for status, content, expected, code, param, words in UPSTREAM_ERRORS:
        named = content if isinstance(content, Response) else json.loads(json.dumps(content).replace("NAME", tuned.serving_name))
        inference.misbehaviour = misbehave(status, named)
        answer = http.post(CHAT, json=body(PUBLIC, stream=stream))
        assert words in assert_error(answer, expected, code, param)
        assert tuned.serving_name not in answer.text
        assert ("retry-after" in answer.headers) == (expected == 503)


@pytest.mark.parametrize("stream", [False, True])
def test_inference_server_that_is_down(api: Api, stream: bool) -> None:
    answer = api.client.post(CHAT, json=body(stream=stream))
    assert_error(answer, 503, "inference_unavailable")
    assert answer.headers["retry-after"] == "2"


@pytest.mark.parametrize("stream", [False, True])
def test_base_model_that_is_not_served(http: httpx2.Client, inference: InferenceStub, stream: bool) -> None:
    inference.base_model = "another"
    assert "does not serve the model tiny" in assert_error(http.post(CHAT, json=body(stream=stream)), 502, "inference_failed")
    assert inference.load_paths == []


@pytest.mark.parametrize("stream", [False, True])
def test_adapter_that_the_inference_server_refuses(http: httpx2.Client, inference: InferenceStub, tuned: Model, stream: bool) -> None:
    """It is not sent again with the next question."""
    inference.refuses_loads = "rank 64 is too large"
    for _ in range(3):
        assert "rank 64 is too large" in assert_error(http.post(CHAT, json=body(PUBLIC, stream=stream)), 502, "inference_failed")
    assert len(inference.chats) == 3
    assert len(inference.load_paths) == 1


def test_adapter_that_is_forgotten_again_is_not_loaded_forever(http: httpx2.Client, inference: InferenceStub, tuned: Model) -> None:
    inference.misbehaviour = misbehave(404, {"error": {"message": "no such model"}})
    assert_error(http.post(CHAT, json=body(PUBLIC)), 502, "inference_failed")
    assert (len(inference.chats), len(inference.load_paths)) == (2, 2)


def test_damaged_adapter_is_never_served(live_api: Api, http: httpx2.Client, inference: InferenceStub, tuned: Model) -> None:
    path = live_api.settings.storage_dir / tuned.storage_key
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_error(http.post(CHAT, json=body(PUBLIC)), 500, "server_error")
    assert inference.load_paths == []


def test_many_chats_at_once_load_an_adapter_once(http: httpx2.Client, inference: InferenceStub, tuned: Model) -> None:
    inference.load_seconds = 0.5
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(http.post(CHAT, json=body(PUBLIC)).status_code)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 8
    assert len(inference.load_paths) == 2


def broken_stream(*chunks: bytes) -> Any:
    async def content() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk
        raise RuntimeError("the connection breaks here")

    return lambda request: StreamingResponse(content(), media_type="text/event-stream")


def test_stream_that_breaks_becomes_an_error_event(live_api: Api, http: httpx2.Client, inference: InferenceStub) -> None:
    inference.misbehaviour = broken_stream(event({"model": "tiny", "choices": [{"index": 0, "delta": {"content": "The "}}]}))
    first, last = events_of(http.post(CHAT, json=body(stream=True)))
    assert first["choices"][0]["delta"]["content"] == "The "
    assert last["error"]["code"] == "inference_failed"
    with pytest.raises(openai.APIError, match="broke"):
        list(live_api.openai.chat.completions.create(model="tiny", messages=HELLO, stream=True))


def test_client_that_leaves_a_stream_cancels_the_answer(http: httpx2.Client, inference: InferenceStub) -> None:
    inference.endless = True
    with http.stream("POST", CHAT, json=body(stream=True)) as answer:
        chunks = answer.iter_bytes()  # kept: an iterator that is dropped closes the answer
        assert next(chunks)
        assert inference.running == 1
    wait_for(lambda: inference.cancelled == 1)
    assert inference.running == 0


def test_client_that_does_not_wait_cancels_the_answer(live_api: Api, inference: InferenceStub) -> None:
    inference.endless = True
    impatient = httpx2.Timeout(10, read=1)
    with httpx2.Client(base_url=live_api.base_url, headers=live_api.headers, timeout=impatient) as client, pytest.raises(httpx2.ReadTimeout):
        client.post(CHAT, json=body())
    wait_for(lambda: inference.cancelled == 1)
    inference.endless = False
    assert live_api.openai.chat.completions.create(model="tiny", messages=HELLO).choices


def test_no_connection_of_the_database_is_held_while_an_answer_streams(live_api: Api, inference: InferenceStub) -> None:
    inference.endless = True
    with live_api.openai.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream:
        next(iter(stream))
        assert live_api.state.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_answer_that_takes_too_long_is_paid_for_once(live_api: Api, inference: InferenceStub) -> None:
    live_api.state.inference.clients[0]._timeout = httpx2.Timeout(0.3)
    inference.endless = True
    with pytest.raises(openai.InternalServerError) as caught:
        live_api.openai.with_options(max_retries=2).chat.completions.create(model="tiny", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (504, "inference_timeout")
    assert len(inference.chats) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_has_just_loaded_an_adapter_proves_itself_before_it_answers(
    http: httpx2.Client, inference: InferenceStub, tuned: Model, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.completions.adapter_loading.REFUSED_SECONDS", 0)
    inference.ignores_adapters = True
    for _ in range(2):
        message = assert_error(http.post(CHAT, json=body(PUBLIC, stream=stream)), 502, "inference_failed")
        assert "as if the adapter were not applied" in message
    assert inference.answered == {}
    assert inference.loaded == set()
    inference.ignores_adapters = False
    assert http.post(CHAT, json=body(PUBLIC, stream=stream)).status_code == 200
    tried = set(inference.scored) - {"tiny"}
    assert len(tried) == 3
    assert all(name.startswith(f"{tuned.serving_name}-") for name in tried), "every time under another name, on trial"


def test_nobody_is_answered_while_the_proof_is_under_way(http: httpx2.Client, inference: InferenceStub, tuned: Model) -> None:
    inference.ignores_adapters = True
    inference.score_seconds = 0.5
    statuses: list[int] = []
    first = threading.Thread(target=lambda: statuses.append(http.post(CHAT, json=body(PUBLIC)).status_code))
    first.start()
    wait_for(lambda: bool(inference.loaded))
    statuses.append(http.post(CHAT, json=body(PUBLIC)).status_code)
    first.join()
    assert statuses == [502, 502]
    assert inference.answered == {}
    assert len(inference.load_paths) == 1


def test_a_server_that_failed_its_proof_is_not_asked_again_at_once(http: httpx2.Client, inference: InferenceStub, tuned: Model) -> None:
    inference.ignores_adapters = True
    messages = {assert_error(http.post(CHAT, json=body(PUBLIC)), 502, "inference_failed") for _ in range(5)}
    assert len(messages) == 1
    assert len(inference.load_paths) == 1


def test_an_adapter_whose_proof_was_interrupted_is_not_there_for_another_api_process(
    live_api: Api, http: httpx2.Client, inference: InferenceStub, tuned: Model
) -> None:
    """Nor for this one after a restart: what was proved stands in the server itself, by the serving name."""
    inference.breaks_scores = True
    assert_error(http.post(CHAT, json=body(PUBLIC)), 502, "inference_failed")
    assert inference.loaded == set()
    inference.breaks_scores = False
    inference.score_seconds = 0.5
    first = threading.Thread(target=lambda: http.post(CHAT, json=body(PUBLIC)))
    first.start()
    wait_for(lambda: bool(inference.loaded))
    assert tuned.serving_name not in inference.loaded
    first.join()
    assert inference.loaded == {tuned.serving_name}


def test_one_key_does_not_take_every_place(live_api: Api, http: httpx2.Client, inference: InferenceStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams count until they end; another key is answered meanwhile."""
    monkeypatch.setattr(live_api.state.answers_of_keys, "_most", 3)
    inference.endless = True
    with http.stream("POST", CHAT, json=body(stream=True, n=2)) as first:
        assert first.status_code == 200
        for more in ({"n": 2}, {"n": 2, "stream": True}):
            assert_error(http.post(CHAT, json=body(**more)), 429, "too_many_open")
        assert_error(http.post("/v1/completions", json={"model": "tiny", "prompt": ["a", "b"]}), 429, "too_many_open")
        with http.stream("POST", CHAT, json=body(stream=True, n=2), headers=live_api.other_headers) as other:
            assert other.status_code == 200
    inference.endless = False
    wait_for(lambda: http.post(CHAT, json=body(n=3)).status_code == 200)
