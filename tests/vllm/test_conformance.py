"""One surface, two servers: whatever the service relies on holds of vLLM and of inference/ alike."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from core.inference_client import AdapterRefused, InferenceClient
from core.settings import Settings
from sdft_engine.generation import score
from sdft_engine.model import LanguageModel
from tests.vllm.conftest import BASE, Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

QUESTION = "What is the capital of France?"
TOLERANCE = 2e-3
"""Nats between two programs in float32."""
MORE_THAN_PLACES = 20
"""Sequences that either server decodes together: SDFT_INFERENCE_MAX_BATCH, 16."""


@pytest.fixture
def client(server: Server, vllm_settings: Settings) -> InferenceClient:
    return InferenceClient(server.url, vllm_settings)


@pytest.fixture
def loaded(server: Server, adapters: dict[str, Path]) -> Iterator[Server]:
    for name, directory in adapters.items():
        assert server.load(name, directory).status_code == 200
    yield server
    for name in adapters:
        server.unload(name)


@pytest.fixture
def ids(model: LanguageModel) -> list[int]:
    return model.chat_format.prompt_ids([{"role": "user", "content": QUESTION}])


def test_it_is_healthy_and_names_the_base_model(server: Server, client: InferenceClient) -> None:
    assert client.healthy()
    assert BASE in server.model_ids()


def test_an_adapter_comes_and_goes(server: Server, client: InferenceClient, adapters: dict[str, Path]) -> None:
    client.load_adapter("first", adapters["first"])
    client.load_adapter("first", adapters["first"])
    assert "first" in server.model_ids()
    again = server.load("first", adapters["first"])
    assert (again.status_code, "already" in again.text) == (400, True)
    client.unload_adapter("first")
    client.unload_adapter("first")
    assert "first" not in server.model_ids()
    assert server.post("/v1/completions", model="first", prompt="x", max_tokens=1).status_code == 404


def test_an_adapter_that_can_t_be_loaded_is_refused_and_does_no_harm(
    server: Server, client: InferenceClient, adapters: dict[str, Path], tmp_path: Path
) -> None:
    broken = adapters["first"].with_name("broken")
    broken.mkdir(exist_ok=True)
    (broken / "adapter_config.json").write_bytes((adapters["first"] / "adapter_config.json").read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    for directory in (broken, broken.with_name("missing")):
        with pytest.raises(AdapterRefused):
            client.load_adapter("broken", directory)
    assert "broken" not in server.model_ids()
    assert server.chat(QUESTION, max_tokens=2)["choices"]


@pytest.mark.parametrize("name", [None, "first", "second"])
def test_log_probabilities_of_a_prompt_are_the_trainer_s(
    loaded: Server, client: InferenceClient, model: LanguageModel, ids: list[int], name: str | None
) -> None:
    assert client.prompt_logprobs(name or BASE, ids) == pytest.approx(score(model, ids, name)[0], abs=TOLERANCE)


def test_answers_side_by_side_are_those_of_each_alone(loaded: Server, client: InferenceClient, model: LanguageModel, ids: list[int]) -> None:
    """Rows of the base and of several adapters in one batch, some reading their prompts while others are being written."""
    expected = {name: score(model, ids, None if name == BASE else name)[0] for name in (BASE, "first", "second", "third")}
    alone = {name: loaded.complete(ids, model=name, max_tokens=24, temperature=0, ignore_eos=True)["choices"][0]["text"] for name in expected}
    assert len(set(alone.values())) == 4, "adapters that change nothing would prove nothing"

    def written(name: str) -> tuple[str, str]:
        return name, loaded.complete(ids, model=name, max_tokens=24, temperature=0, ignore_eos=True)["choices"][0]["text"]

    def scored(name: str) -> tuple[str, list[float]]:
        return name, client.prompt_logprobs(name, ids)

    with ThreadPoolExecutor(12) as threads:
        writing = [threads.submit(written, name) for _ in range(2) for name in expected]
        scoring = [threads.submit(scored, name) for _ in range(3) for name in expected]
        for future in scoring:
            name, logps = future.result()
            assert logps == pytest.approx(expected[name], abs=TOLERANCE), name
        for answer in writing:
            name, text = answer.result()
            assert text == alone[name], name


def test_the_same_question_has_the_same_answer_on_both(vllm_server: Server, embedded_server: Server, adapters: dict[str, Path]) -> None:
    answers = {}
    for server in (vllm_server, embedded_server):
        assert server.load("first", adapters["first"]).status_code == 200
        for name in (BASE, "first"):
            answers[server.kind, name] = server.chat(QUESTION, model=name, max_tokens=12, temperature=0)["choices"][0]["message"]["content"]
        server.unload("first")
    assert answers["vllm", BASE] == answers["embedded", BASE]
    assert answers["vllm", "first"] == answers["embedded", "first"] != answers["vllm", BASE]


def test_prompts_may_be_text_or_token_ids(server: Server, model: LanguageModel) -> None:
    text = "The capital of France is"
    by_text = server.complete(text, max_tokens=4, temperature=0)["choices"][0]["text"]
    by_ids = server.complete(model.chat_format.encode(text), max_tokens=4, temperature=0)["choices"][0]["text"]
    assert by_text == by_ids != ""


def test_usage_ends_and_limits(server: Server) -> None:
    cut = server.chat("Count from one to a hundred, please.", max_tokens=5, temperature=0)
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 5)
    whole = server.chat(QUESTION, max_tokens=200, temperature=0)
    assert whole["choices"][0]["finish_reason"] == "stop"
    stopped = server.chat(QUESTION, max_tokens=200, temperature=0, stop=["Paris"])
    assert "Paris" not in stopped["choices"][0]["message"]["content"]
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_choices_and_seeds(server: Server) -> None:
    several = server.chat("Name an animal.", n=3, max_tokens=8, temperature=1.5, seed=1)["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in several}) > 1
    same = [server.chat("Name an animal.", max_tokens=12, temperature=1.0, seed=7)["choices"][0]["message"]["content"] for _ in range(2)]
    assert same[0] == same[1]


def test_log_probabilities_of_an_answer(server: Server) -> None:
    logprobs = server.chat(QUESTION, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert len(logprobs) == 4
    for token in logprobs:
        assert token["logprob"] <= 0
        assert [token["logprob"] >= other["logprob"] - 1e-6 for other in token["top_logprobs"][:2]] == [True, True]
    whole = server.complete("The capital", max_tokens=2, temperature=0, logprobs=1)["choices"][0]["logprobs"]
    assert len(whole["tokens"]) == len(whole["token_logprobs"]) == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_is_events_to_the_end(server: Server, path: str) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}]} if "chat" in path else {"prompt": "The capital of France is"}
    body = asked | {"model": BASE, "max_tokens": 6, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    with server.client.stream("POST", path, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    texts = [(choice.get("delta") or {}).get("content") or choice.get("text") or "" for chunk in chunks for choice in chunk["choices"]]
    whole = server.post(path, **(body | {"stream": False, "stream_options": None})).json()["choices"][0]
    assert "".join(texts) == (whole["message"]["content"] if "chat" in path else whole["text"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "nobody", "messages": [{"role": "user", "content": "x"}]}, 404),
        ({"model": BASE, "messages": [{"role": "user", "content": "x"}], "temperature": -1}, 400),
        ({"model": BASE, "messages": [{"role": "user", "content": "word " * 9000}]}, 400),
        ({"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, 400),
    ],
)
def test_what_is_wrong_is_refused_in_openai_s_form(server: Server, body: dict[str, Any], status: int) -> None:
    answer = server.post("/v1/chat/completions", **body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "Tell a very long story."}], "max_tokens": 4000, "stream": True, "ignore_eos": True}
    for _ in range(MORE_THAN_PLACES):
        with server.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    assert server.client.post("/v1/completions", json={"model": BASE, "prompt": "Hi", "max_tokens": 2}, timeout=60).status_code == 200


def test_many_adapters_share_few_slots(loaded: Server, client: InferenceClient, model: LanguageModel, ids: list[int], adapters: dict[str, Path]) -> None:
    """More names than vLLM keeps in memory, asked for all at once: each is read from disk again when its turn comes. The embedded
    server forgets what is too much for it, and is given less."""
    count = 300 if loaded.kind == "vllm" else 24
    names = {f"copy-{number}": sorted(adapters)[number % len(adapters)] for number in range(count)}
    for name, original in names.items():
        assert loaded.load(name, adapters[original]).status_code == 200
    expected = {name: score(model, ids, name)[0] for name in adapters}
    try:
        with ThreadPoolExecutor(12) as threads:
            found = dict(zip(names, threads.map(lambda name: client.prompt_logprobs(name, ids), names), strict=True))
        for name, original in names.items():
            assert found[name] == pytest.approx(expected[original], abs=TOLERANCE), name
    finally:
        for name in names:
            loaded.unload(name)
