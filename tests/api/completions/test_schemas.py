from typing import Any

import pytest
from pydantic import ValidationError

from api.completions.schemas import ChatRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "hi"}]
FORWARDED: dict[str, Any] = {
    "max_tokens": 5,
    "max_completion_tokens": 6,
    "temperature": 0,
    "top_p": 0.9,
    "n": 2,
    "stop": ["a", "b", "c", "d"],
    "seed": 7,
    "logprobs": True,
    "top_logprobs": 3,
    "logit_bias": {"5": -1.5},
    "frequency_penalty": 0.1,
    "presence_penalty": -0.1,
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "stream": True,
    "stream_options": {"include_usage": True},
    "reasoning_effort": "low",
}


def chat(**fields: Any) -> dict[str, Any]:
    return ChatRequest.model_validate({"model": "tiny", "messages": MESSAGES, **fields}).forwarded("internal")


def test_known_fields_are_forwarded_under_the_internal_name() -> None:
    assert chat() == {"model": "internal", "messages": MESSAGES}
    assert chat(**FORWARDED) == {"model": "internal", "messages": MESSAGES, **FORWARDED}


def test_fields_that_change_no_answer_stay_here() -> None:
    assert chat(user="me", metadata={"a": "b"}, store=True) == chat()


def test_unknown_fields_never_pass() -> None:
    hostile = {"chat_template": "{{ 1 }}", "lora_path": "/etc", "prompt_logprobs": 5, "guided_json": {}, "stop_token_ids": [1], "min_tokens": 9}
    assert chat(**hostile) == chat()
    nested = chat(messages=[{**MESSAGES[0], "chat_template": "x"}], stream_options={"include_usage": True, "hidden": 1})
    assert nested == chat(stream_options={"include_usage": True})


@pytest.mark.parametrize("name", ["functions", "function_call", "web_search_options", "moderation", "audio", "prediction"])
def test_fields_that_would_change_the_answer_are_refused(name: str) -> None:
    assert chat(**{name: None}) == chat()
    with pytest.raises(ValidationError) as caught:
        chat(**{name: {}})
    assert [(error["type"], error["loc"]) for error in caught.value.errors()] == [("unsupported_parameter", (name,))]


def test_modalities() -> None:
    assert chat(modalities=["text"]) == chat()
    with pytest.raises(ValidationError):
        chat(modalities=["text", "audio"])


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]
    assert chat(messages=[{"role": "user", "content": parts}])["messages"] == [{"role": "user", "content": "What is\nthis?"}]


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}, {"type": "input_audio"}, {"type": "text"}, {"text": "x"}, "x", None]
)
def test_other_parts_are_refused(part: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(messages=[{"role": "user", "content": [part]}])
    assert caught.value.errors()[0]["type"] == "unsupported_content"
    assert "must be {type: text, text: …};" in caught.value.errors()[0]["msg"]


def test_conversation_with_tools() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3", "tool_call_id": "call_1"}]
    assert chat(messages=messages)["messages"] == [messages[0], {"role": "assistant", "tool_calls": [call]}, messages[2]]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "wizard", "content": "hi"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"temperature": 2.1},
        {"temperature": -0.1},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"n": 0},
        {"n": 129},
        {"max_tokens": 0},
        {"top_logprobs": 21},
        {"logit_bias": {"5": float("inf")}},
        {"stream": "yes"},
        {"stop": [3]},
        {"model": 3},
    ],
)
def test_wrong_values(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chat(**fields)


@pytest.mark.parametrize("prompt", ["text", ["a", "b"], [1, 2, 3], [[1, 2], [3]]])
def test_prompts_of_completions(prompt: Any) -> None:
    request = CompletionRequest.model_validate({"model": "tiny", "prompt": prompt, "logprobs": 5, "echo": True, "max_tokens": 0, "best_of": None})
    assert request.forwarded("internal") == {"model": "internal", "prompt": prompt, "logprobs": 5, "echo": True, "max_tokens": 0}


@pytest.mark.parametrize("fields", [{"prompt": 3}, {"prompt": [1.5]}, {"prompt": [-1]}, {"logprobs": 6}, {"suffix": "x"}, {"best_of": 2}])
def test_wrong_completions(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"model": "tiny", "prompt": "x", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["x"] * 5},
        {"stop": "x" * 257},
        {"stop": [""]},
        {"logit_bias": {str(token): 1.0 for token in range(1025)}},
        {"response_format": {"type": "structural_tag"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 10] * 10_000}}}},
        {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 70_000}}]},
    ],
)
def test_what_would_keep_an_inference_server_busy_for_everybody_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chat(**fields)


@pytest.mark.parametrize(("prompt", "n", "passes"), [([[1]] * 8, 128, True), ([[1]] * 9, 128, False), (["a"] * 1025, None, False), ([1] * 5000, 128, True)])
def test_prompts_times_answers_are_bounded(prompt: Any, n: int | None, passes: bool) -> None:
    request = {"model": "tiny", "prompt": prompt, "n": n}
    if passes:
        assert CompletionRequest.model_validate(request).n == n
    else:
        with pytest.raises(ValidationError, match="1,024"):
            CompletionRequest.model_validate(request)


def test_a_fifth_stop_string_is_counted_in_the_refusal() -> None:
    with pytest.raises(ValidationError) as caught:
        chat(stop=["a", "b", "c", "d", "e"])
    (error,) = caught.value.errors()
    assert (error["type"], error["loc"], error["msg"]) == ("too_long", ("stop",), "at most 4 strings, not 5")
