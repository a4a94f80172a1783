import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import openai
import pytest
import torch

from inference.detokenizer import TokenTable
from sdft_engine.contract.prompts import ChatFormat
from tests.inference.conftest import ADAPTERS
from tests.inference.serving import BASE, RunningServer, held, wait_until

MODELS = (BASE, *ADAPTERS)
QUESTION = [{"role": "user", "content": "which lamp is red?"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def content(body: dict[str, Any], index: int = 0) -> str:
    text: str = body["choices"][index]["message"]["content"]
    return text


def joined(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices if choice["index"] == index)


def test_the_stock_client_chats(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    answer = client.chat.completions.create(model="first", messages=QUESTION, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == content(server.chat(QUESTION[0]["content"], model="first", max_tokens=12, temperature=0))
    assert answer.usage is not None
    assert (answer.object, answer.model, answer.usage.completion_tokens) == ("chat.completion", "first", 12)
    with client.chat.completions.create(model="first", messages=QUESTION, max_tokens=12, temperature=0, stream=True) as stream:  # type: ignore[arg-type, union-attr]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content


def test_the_prompt_is_the_chat_template_of_the_base_model(server: RunningServer, reference_logprobs: Callable[..., torch.Tensor]) -> None:
    chat_format: ChatFormat = server.engine.model.chat_format
    prompt_ids = chat_format.prompt_ids(QUESTION)
    body = server.chat(QUESTION[0]["content"], max_tokens=1, temperature=0, logprobs=True, top_logprobs=3)
    expected = reference_logprobs([*prompt_ids, 0], None)[-1].topk(3)
    (entry,) = body["choices"][0]["logprobs"]["content"]
    assert [top["token"] for top in entry["top_logprobs"]] == [server_token(server, token_id) for token_id in expected.indices.tolist()]
    assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert (entry["token"], entry["logprob"]) == (entry["top_logprobs"][0]["token"], entry["top_logprobs"][0]["logprob"])
    assert bytes(entry["bytes"]).decode() == entry["token"]
    assert body["usage"] == {"prompt_tokens": len(prompt_ids), "completion_tokens": 1, "total_tokens": len(prompt_ids) + 1}


def server_token(server: RunningServer, token_id: int) -> str:
    return str(server.engine.model.chat_format.tokenizer.decode([token_id]))


def test_log_probabilities_are_the_models_own_at_any_temperature(server: RunningServer, reference_logprobs: Callable[..., torch.Tensor]) -> None:
    prompt_ids = server.engine.model.chat_format.prompt_ids(QUESTION)
    body = server.chat(QUESTION[0]["content"], model="first", max_tokens=20, temperature=0.6, seed=1, logprobs=True, ignore_eos=True)
    entries = body["choices"][0]["logprobs"]["content"]
    table = TokenTable(server.engine.model.chat_format.tokenizer)
    id_by_bytes = {table.bytes_of(token_id): token_id for token_id in range(512)}
    answer_ids = [id_by_bytes[bytes(entry["bytes"])] for entry in entries]
    expected = reference_logprobs([*prompt_ids, *answer_ids], "first")[len(prompt_ids) - 1 :]
    assert len(set(answer_ids)) > 5
    assert [entry["logprob"] for entry in entries] == pytest.approx(expected.gather(1, torch.tensor(answer_ids)[:, None])[:, 0].tolist(), abs=1e-4)


def test_adapters_change_the_answer_and_leave_the_base_alone(make_server: Callable[..., AbstractContextManager[RunningServer]]) -> None:
    with make_server() as server:
        before = content(server.chat(max_tokens=16, temperature=0))
        for name in ADAPTERS:
            assert server.load(name, server.adapters_dir / name).status_code == 200
        answers = {model: content(server.chat(model=model, max_tokens=16, temperature=0)) for model in MODELS}
        assert answers[BASE] == before
        assert len(set(answers.values())) == 3


def test_answers_given_together_equal_answers_given_alone(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different lengths and adapters in one batch; greedily, token for token."""
    requests = [(model, f"question {'again ' * n}please: lamp {n}?") for n in range(5) for model in MODELS]
    widths: list[int] = []
    logits = server.engine.model.logits

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        widths.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(server.engine.model, "logits", watched)

    def ask(request: tuple[str, str]) -> list[str]:
        body = server.chat(request[1], model=request[0], max_tokens=40, temperature=0, logprobs=True)
        return [entry["token"] for entry in body["choices"][0]["logprobs"]["content"]]

    alone = [ask(request) for request in requests]
    assert max(widths) == 1
    with ThreadPoolExecutor(len(requests)) as pool:
        with held(server.engine):
            asking = [pool.submit(ask, request) for request in requests]
            wait_until(lambda: server.engine.load == (0, len(requests)))
        together = [asked.result() for asked in asking]
    assert max(widths) > 8
    assert together == alone


def test_a_seed_repeats_the_answer_whoever_is_beside_it(server: RunningServer) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 0.9, "top_p": 0.95}
    alone = content(server.chat(seed=7, **options))
    with ThreadPoolExecutor(6) as pool:
        with held(server.engine):
            others = [pool.submit(server.chat, model="second", **options) for _ in range(5)]
            asked = pool.submit(server.chat, seed=7, **options)
            wait_until(lambda: server.engine.load == (0, 6))
        assert content(asked.result()) == alone
        assert len({content(other.result()) for other in others}) == 5
    assert content(server.chat(seed=8, **options)) != alone


def test_n_answers_differ_and_repeat_with_their_seed(server: RunningServer) -> None:
    body = server.chat(n=3, seed=5, max_tokens=20)
    texts = [content(body, index) for index in range(3)]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [content(server.chat(n=3, seed=5, max_tokens=20), index) for index in range(3)] == texts
    assert body["usage"]["completion_tokens"] <= 60


def test_streaming_joins_to_the_plain_answer(server: RunningServer) -> None:
    """The tiny model at temperature 1.5 says all kinds of bytes."""
    options: dict[str, Any] = {"model": "first", "messages": QUESTION, "max_tokens": 60, "temperature": 1.5, "seed": 3, "n": 2}
    plain = server.post("/v1/chat/completions", **options).json()
    events = list(server.stream("/v1/chat/completions", stream_options={"include_usage": True}, **options))
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == plain["usage"]
    assert [event["usage"] for event in events[:-2]] == [None] * (len(events) - 2)
    assert [event["choices"][0]["delta"] for event in events[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert len(events) > 20
    for index in range(2):
        reasons = [choice["finish_reason"] for event in events[:-1] for choice in event["choices"] if choice["index"] == index]
        assert joined(events, index) == content(plain, index)
        assert reasons == [None] * (len(reasons) - 1) + [plain["choices"][index]["finish_reason"]]
    assert any(ord(character) > 127 for character in content(plain) + content(plain, 1))


def test_streamed_multibyte_text_is_never_cut(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is made to say this text byte by byte: a character arrives whole, with the token that completes it."""
    ids = iter(server.engine.model.chat_format.encode("ok🤖本"))
    monkeypatch.setattr(server.engine.model, "logits", lambda hidden: torch.nn.functional.one_hot(torch.tensor([next(ids)]), 512) * 1e3)
    options: dict[str, Any] = {"model": BASE, "messages": QUESTION, "max_tokens": 9, "temperature": 0, "logprobs": True}
    chunks = [event["choices"][0] for event in server.stream("/v1/chat/completions", **options) if event != "[DONE]"][1:]
    said = [[bytes(token["bytes"]) for token in chunk["logprobs"]["content"]] for chunk in chunks]
    assert [chunk["delta"]["content"] for chunk in chunks] == ["o", "k", "🤖", "本"]
    assert said == [[b"o"], [b"k"], [bytes([byte]) for byte in "🤖".encode()], [bytes([byte]) for byte in "本".encode()]]


def test_stop_strings_end_the_answer_and_never_leak(server: RunningServer) -> None:
    free = content(server.chat(max_tokens=30, temperature=0, model="first"))
    stop = free[len(free) // 2 : len(free) // 2 + 5]
    expected = free[: free.index(stop)]
    body = server.chat(max_tokens=30, temperature=0, model="first", stop=[stop, "never said"])
    assert (content(body), body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == (expected, "stop", stop)
    assert body["usage"]["completion_tokens"] < 30
    events = list(
        server.stream(
            "/v1/chat/completions", model="first", messages=[{"role": "user", "content": "what is the capital?"}], max_tokens=30, temperature=0, stop=stop
        )
    )
    assert joined(events) == expected
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


def test_end_tokens_end_the_answer(server: RunningServer) -> None:
    for token in ("<|im_end|>", "<|endoftext|>"):
        bias = {str(server.engine.model.chat_format.tokenizer.token_to_id(token)): 100}
        body = server.chat(max_tokens=30, logit_bias=bias)
        assert (content(body), body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == ("", "stop", 1)
        ignored = server.chat(max_tokens=5, logit_bias=bias, ignore_eos=True)
        assert (content(ignored), ignored["choices"][0]["finish_reason"], ignored["usage"]["completion_tokens"]) == ("", "length", 5)


def test_stop_token_ids_are_named_as_the_reason(server: RunningServer) -> None:
    body = server.chat(max_tokens=9, logit_bias={"100": 100}, stop_token_ids=[100])
    assert (content(body), body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == ("", "stop", 100)


def test_penalties_keep_the_model_from_repeating_itself(server: RunningServer) -> None:
    def distinct(**penalty: Any) -> int:
        body = server.chat("hello", max_tokens=8, temperature=0, logprobs=True, **penalty)
        return len({tuple(entry["bytes"]) for entry in body["choices"][0]["logprobs"]["content"]})

    assert distinct() <= 2
    assert distinct(frequency_penalty=2.0) > 4
    assert distinct(presence_penalty=2.0) > 4


def test_the_context_is_filled_when_no_length_is_asked_for(server: RunningServer) -> None:
    body = server.chat(ignore_eos=True)
    assert body["usage"]["total_tokens"] == 512
    assert body["choices"][0]["finish_reason"] == "length"


def test_text_parts_are_joined_and_tool_turns_reach_the_template(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "which lamp"}, {"type": "text", "text": "is red?"}]
    options: dict[str, Any] = {"model": BASE, "max_tokens": 8, "temperature": 0}
    split = server.post("/v1/chat/completions", messages=[{"role": "user", "content": parts}], **options).json()
    whole = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "which lamp\nis red?"}], **options).json()
    assert (split["choices"], split["usage"]) == (whole["choices"], whole["usage"])
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    turns = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "sunny"}]
    with_tools = server.post("/v1/chat/completions", messages=turns, tools=[TOOL], **options).json()
    assert with_tools["usage"]["prompt_tokens"] == len(server.engine.model.chat_format.prompt_ids(turns, [TOOL]))


def test_tool_choice_none_hides_the_tools(server: RunningServer) -> None:
    options: dict[str, Any] = {"model": BASE, "messages": QUESTION, "max_tokens": 1}
    bare = server.post("/v1/chat/completions", **options).json()["usage"]["prompt_tokens"]
    assert server.post("/v1/chat/completions", tools=[TOOL], tool_choice="none", **options).json()["usage"]["prompt_tokens"] == bare
    assert server.post("/v1/chat/completions", tools=[TOOL], tool_choice="auto", **options).json()["usage"]["prompt_tokens"] > bare


def test_tools_that_the_template_would_drop_are_refused(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_format = server.engine.model.chat_format
    monkeypatch.setattr(type(chat_format), "render", lambda self, messages, tools=None, generate=True: "always the same")
    answer = server.post("/v1/chat/completions", model=BASE, messages=QUESTION, tools=[TOOL])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "tools", "unsupported_parameter")
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    turns = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "sunny"}]
    error = server.post("/v1/chat/completions", model=BASE, messages=turns).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "unsupported_parameter")


@pytest.mark.parametrize("depth", [65, 900, 100_000])
def test_arguments_that_are_nested_without_end_are_a_400(server: RunningServer, depth: int) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "[" * depth + "]" * depth}}
    turns = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "sunny"}]
    answer = server.post("/v1/chat/completions", model=BASE, messages=turns)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert "deeper than 64 levels" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "wizard", "content": "hi"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": 3}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "x" * 9_000}]}]}),
        ("messages", {"messages": [{"role": "user", "content": "word " * 600}]}),
        ("messages", {"max_tokens": 512}),
        ("max_tokens", {"max_tokens": 0}),
        ("temperature", {"temperature": -1}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": 0}),
        ("n", {"n": 0}),
        ("n", {"n": True}),
        ("seed", {"seed": 2**63}),
        ("stop", {"stop": 3}),
        ("stop", {"stop": ""}),
        ("logit_bias", {"logit_bias": {"512": 1}}),
        ("logit_bias", {"logit_bias": {"lamp": 1}}),
        ("logit_bias", {"logit_bias": {"-1": 1}}),
        ("logit_bias", {"logit_bias": {"0000000000000000512": 1}}),
        ("logit_bias.5", {"logit_bias": {"5": 101}}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {}}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "required"}),
        ("functions", {"functions": [TOOL["function"]]}),
        ("top_k", {"top_k": 5}),
        ("min_tokens", {"min_tokens": True}),
        ("continue_final_message", {"continue_final_message": True}),
        ("chat_template", {"chat_template": "{{ messages }}"}),
        ("echo", {"echo": True}),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_the_field(server: RunningServer, param: str, options: dict[str, Any]) -> None:
    body = {"model": BASE, "messages": QUESTION, **options}
    answer = server.client.post("/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.content) < 1_000


def test_fields_that_ask_for_nothing_are_accepted(server: RunningServer) -> None:
    nothing = {
        "response_format": {"type": "text"},
        "top_k": -1,
        "tools": None,
        "audio": None,
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "unheard_of": 1,
    }
    assert server.chat(max_tokens=1, **nothing)["usage"]["completion_tokens"] == 1


def test_too_long_a_prompt_says_so(server: RunningServer) -> None:
    error = server.post("/v1/chat/completions", model=BASE, messages=QUESTION, max_tokens=500).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "512 tokens" in error["message"]
    assert "500 for the answer" in error["message"]


def test_half_a_surrogate_pair_is_no_text(server: RunningServer) -> None:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "a\\ud800"}]}'
    answer = server.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_unknown_models_are_404(server: RunningServer) -> None:
    answer = server.post("/v1/chat/completions", model="third", messages=QUESTION)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
