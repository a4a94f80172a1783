from collections.abc import Callable
from typing import Any

import pytest
import torch

from inference.detokenizer import TokenTable
from tests.inference.conftest import ADAPTERS
from tests.inference.serving import BASE, RunningServer

Reference = Callable[[list[int], str | None], torch.Tensor]
PROMPT = "What is the capital of the country? When should customers expect their parcel?"


def encode(server: RunningServer, text: str) -> list[int]:
    return server.engine.model.chat_format.encode(text)


@pytest.mark.parametrize("model", [BASE, *ADAPTERS])
def test_echoed_log_probabilities_are_those_of_the_plain_model(server: RunningServer, reference_logprobs: Reference, model: str) -> None:
    """Against transformers for the base and stock PEFT for adapters: what is served is what was trained."""
    ids, table = encode(server, PROMPT), TokenTable(server.engine.model.chat_format.tokenizer)
    body = server.complete(ids, model=model, max_tokens=1, temperature=0, echo=True, logprobs=2)
    logprobs = body["choices"][0]["logprobs"]
    expected = reference_logprobs(ids, None if model == BASE else model)
    own = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=1e-4)
    assert len(logprobs["token_logprobs"]) == len(ids) + 1
    for position, alternatives in enumerate(logprobs["top_logprobs"][1 : len(ids)]):
        likeliest = expected[position].topk(2)
        likeliest_texts = {table.text_of(token_id) for token_id in likeliest.indices.tolist()}
        assert set(alternatives) == likeliest_texts | {logprobs["tokens"][position + 1]}
        assert max(alternatives.values()) == pytest.approx(likeliest.values[0].item(), abs=1e-4)


def test_a_bare_echo_generates_nothing(server: RunningServer) -> None:
    ids = encode(server, PROMPT)
    body = server.complete(PROMPT, max_tokens=0, echo=True, logprobs=1)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert body["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
    assert server.complete(PROMPT, max_tokens=0, echo=True)["choices"][0]["logprobs"] is None


def test_one_token_can_be_echoed(server: RunningServer) -> None:
    choice = server.complete([70], max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == [None]


def test_offsets_point_at_the_tokens_in_the_text(server: RunningServer) -> None:
    choice = server.complete(PROMPT, max_tokens=8, temperature=0, echo=True, logprobs=0)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(PROMPT)
    assert len(logprobs["tokens"]) == len(encode(server, PROMPT)) + 8
    checked = 0
    for before, token, offset in zip(["", *logprobs["tokens"]], logprobs["tokens"], logprobs["text_offset"], strict=False):
        if "\ufffd" not in before + token:  # a token that begins or ends inside a character has the character's offset
            assert choice["text"][offset:].startswith(token)
            checked += 1
    assert checked > 25


def test_all_four_forms_of_a_prompt_are_the_same_prompt(server: RunningServer) -> None:
    ids = encode(server, PROMPT)
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    text = server.complete(PROMPT, **options)["choices"][0]["text"]
    for prompt in ([PROMPT], ids, [ids]):
        assert server.complete(prompt, **options)["choices"][0]["text"] == text
    assert server.complete(ids, max_tokens=0, echo=True)["choices"][0]["text"] == PROMPT


def test_choices_are_ordered_by_prompt_then_by_answer(server: RunningServer) -> None:
    prompts = ["the red lamp", "a much longer question about the support desk and its lamp", "once"]
    body = server.complete(prompts, n=2, max_tokens=3, temperature=0, echo=True)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    for index, prompt in enumerate(prompts):
        alone = server.complete(prompt, max_tokens=3, temperature=0, echo=True)["choices"][0]["text"]
        assert [choice["text"] for choice in body["choices"][2 * index : 2 * index + 2]] == [alone, alone]
    assert body["usage"]["prompt_tokens"] == sum(len(encode(server, prompt)) for prompt in prompts)
    assert body["usage"]["completion_tokens"] == 18


def test_streaming_joins_to_the_plain_answer(server: RunningServer) -> None:
    options: dict[str, Any] = {"model": "second", "prompt": [PROMPT, "the"], "max_tokens": 20, "seed": 4, "echo": True, "logprobs": 1}
    plain = server.post("/v1/completions", **options).json()
    events = list(server.stream("/v1/completions", stream_options={"include_usage": True}, **options))
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"] == plain["usage"]
    for choice in plain["choices"]:
        mine = [c for event in events[:-2] for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [token for c in mine for token in c["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert [offset for c in mine for offset in c["logprobs"]["text_offset"]] == choice["logprobs"]["text_offset"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_sixteen_tokens_unless_asked_otherwise(server: RunningServer) -> None:
    assert server.complete(PROMPT, ignore_eos=True)["usage"]["completion_tokens"] == 16
    assert server.complete([70] * 510, ignore_eos=True)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": 3}),
        ("prompt", {"prompt": [512]}),
        ("prompt", {"prompt": ["the"] * 342, "n": 3}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [70] * 512}),
        ("prompt", {"prompt": [70] * 500, "max_tokens": 13}),
        ("max_tokens", {"max_tokens": 0}),
        ("logprobs", {"logprobs": 6}),
        ("suffix", {"suffix": "after"}),
        ("best_of", {"best_of": 2}),
        ("model", {"model": None}),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_the_field(server: RunningServer, param: str, options: dict[str, Any]) -> None:
    answer = server.post("/v1/completions", **({"model": BASE, "prompt": "the"} | options))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("invalid_value", {"prompt": []}),
        ("invalid_value", {"prompt": ""}),
        ("invalid_value", {"prompt": [512]}),
        ("invalid_value", {"max_tokens": 0}),
        ("invalid_value", {"logit_bias": {"lamp": 1}}),
        ("greater_than", {"top_p": 0}),
        ("string_too_short", {"stop": ""}),
        ("less_than", {"seed": 2**63}),
    ],
)
def test_a_400_says_by_its_code_what_is_wrong(server: RunningServer, code: str, options: dict[str, Any]) -> None:
    answer = server.post("/v1/completions", **({"model": BASE, "prompt": "the"} | options))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
