"""sdft_engine.generation: a row decodes the same whatever else is in its batch, and as a plain forward pass says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdft_engine import model as model_module
from sdft_engine.generation import DecodingBatch, decode_all, score
from sdft_engine.lora import LoraShape
from sdft_engine.model import LanguageModel
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.seeds import seed_of
from tests.sdft_engine.plain import PlainModel, add_adapter, in_float64, tokens
from tests.sdft_engine.recording import watched

LENGTHS = (3, 17, 1, 40, 9)
PROMPTS = [tokens(seed, length) for seed, length in enumerate(LENGTHS)]
NEW_TOKENS = 24


def greedy(prompt: list[int], new_tokens: int = NEW_TOKENS, adapter: str | None = None, **options: Any) -> Decoding:
    return Decoding(prompt, SamplingParams(new_tokens, temperature=0.0, **options), adapter)


def sampled(row: int, new_tokens: int = NEW_TOKENS, adapter: str | None = None, seed: int = 0) -> Decoding:
    return Decoding(PROMPTS[row], SamplingParams(new_tokens, seed=seed_of(seed, row)), adapter)


def alone(model: LanguageModel, sequence: Decoding) -> list[int]:
    decode_all(model, [sequence])
    return sequence.token_ids


def test_batched_greedy_equals_transformers_generate(model: LanguageModel, tiny_model_dir: Path) -> None:
    stop = model.chat_format.eos_token_ids
    sequences = [greedy(prompt, stop_token_ids=stop) for prompt in PROMPTS]
    decode_all(model, sequences)
    network = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for sequence in sequences:
        ids = torch.tensor([sequence.prompt_ids])
        out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=sorted(stop))
        assert sequence.token_ids == out[0, ids.shape[1] :].tolist()
    assert len({tuple(sequence.token_ids) for sequence in sequences}) == len(PROMPTS)


@pytest.mark.parametrize("make", [lambda row: greedy(PROMPTS[row]), sampled], ids=["greedy", "sampled"])
def test_rows_that_join_and_leave_midway_keep_their_tokens(model: LanguageModel, make: Callable[[int], Decoding]) -> None:
    expected = [alone(model, make(row)) for row in range(len(PROMPTS))]
    sequences = [make(row) for row in range(len(PROMPTS))]
    batch = DecodingBatch(model)
    batch.add(sequences[:2])
    for _ in range(5):
        batch.step()
    batch.add(sequences[2:3])
    batch.step()
    batch.remove(sequences[1])  # the longest prompt so far: columns are dropped
    for _ in range(4):
        batch.step()
    batch.add(sequences[3:])  # the longest of all
    while batch.active:
        batch.step()
    assert sequences[1].token_ids == expected[1][: len(sequences[1].token_ids)]
    assert sequences[1].finish_reason is None
    assert len(sequences[1].token_ids) == 7
    assert [s.token_ids for s in sequences[:1] + sequences[2:]] == expected[:1] + expected[2:]


def test_a_batch_shrinks_as_rows_end(model: LanguageModel) -> None:
    short, long = greedy(PROMPTS[3], 2), greedy(PROMPTS[0], 6)
    batch = DecodingBatch(model)
    batch.add([short, long])
    batch.step()
    assert batch.active == [long]
    assert batch._cache is not None
    assert batch._cache.layers[0].keys.shape[2] == batch._mask_BT.shape[1] == len(PROMPTS[0]) + 1  # the width of the other row is gone
    while batch.active:
        batch.step()
    assert batch._cache is None
    batch.step()  # nothing to do
    batch.add([])
    assert len(long.token_ids) == 6


def test_more_rows_than_the_batch_holds(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for _ in range(3) for row in range(len(PROMPTS))]
    lengths = [1 + index % 7 for index in range(len(rows))]
    widths: list[int] = []
    monkeypatch.setattr(model, "logits", watched(model.logits, lambda hidden: widths.append(len(hidden))))
    sequences = [greedy(PROMPTS[row], length) for row, length in zip(rows, lengths, strict=True)]
    decode_all(model, sequences, max_batch=4)
    assert max(widths) == 4
    for row, length, sequence in zip(rows, lengths, sequences, strict=True):
        assert sequence.token_ids == alone(model, greedy(PROMPTS[row], length))
        assert sequence.finish_reason == "length"


def test_a_pass_reads_no_more_padded_prompt_tokens_than_allowed(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    monkeypatch.setattr(model, "hidden_states", watched(model.hidden_states, lambda input_ids, **_: read.append(tuple(input_ids.shape))))
    sequences = [greedy(prompt, 3) for prompt in PROMPTS]
    longest = max(len(prompt) for prompt in PROMPTS)
    decode_all(model, sequences, max_prompt_tokens=longest + 1)
    prefills = [shape for shape in read if shape[1] > 1]
    assert sum(rows for rows, _ in prefills) == len(PROMPTS)
    assert max(rows * width for rows, width in prefills) <= longest + 1
    monkeypatch.undo()
    assert [sequence.token_ids for sequence in sequences] == [alone(model, greedy(prompt, 3)) for prompt in PROMPTS]


def test_the_cache_is_never_larger_than_allowed(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as fit when all get as long as they may; a row that alone is longer has the batch to itself."""
    longest = max(len(prompt) for prompt in PROMPTS) + 5
    for allowed, most_rows in ((2 * longest + 1, 2), (longest - 3, 1)):
        widths: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(model, "logits", watched(model.logits, lambda hidden, widths=widths: widths.append(len(hidden))))
            sequences = [greedy(prompt, 5) for prompt in PROMPTS]
            decode_all(model, sequences, max_cached_tokens=allowed)
        assert max(widths) == most_rows
        assert [sequence.token_ids for sequence in sequences] == [alone(model, greedy(prompt, 5)) for prompt in PROMPTS]


@pytest.mark.parametrize("adapter", [None, "a"])
def test_what_the_prompts_share_is_computed_once(model: LanguageModel, adapter: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if adapter:
        add_adapter(model, adapter, seed=1)
    prompts = [tokens(99, 50) + prompt for prompt in PROMPTS]
    read: list[tuple[int, ...]] = []
    sequences = [greedy(prompt, adapter=adapter) for prompt in prompts]
    batch = DecodingBatch(model)
    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden_states", watched(model.hidden_states, lambda ids, **_: read.append(tuple(ids.shape))))
        batch.add(sequences[:3])
        assert read == [(1, 50), (3, 17)]
    for _ in range(4):
        batch.step()
    batch.add(sequences[3:])
    while batch.active:
        batch.step()
    assert [sequence.token_ids for sequence in sequences] == [alone(model, greedy(prompt, adapter=adapter)) for prompt in prompts]


def test_rows_of_different_adapters_share_no_prefix(model: LanguageModel) -> None:
    add_adapter(model, "a", seed=1)
    prompt = tokens(99, 60)
    sequences = [greedy(prompt), greedy(prompt, adapter="a")]
    decode_all(model, sequences)
    assert [sequence.token_ids for sequence in sequences] == [alone(model, greedy(prompt)), alone(model, greedy(prompt, adapter="a"))]
    assert sequences[0].token_ids != sequences[1].token_ids


def test_every_end_of_sequence_id_ends_an_answer(model: LanguageModel) -> None:
    stop = model.chat_format.eos_token_ids
    assert stop == {0, 2}
    for token_id in stop:
        ended = greedy(PROMPTS[0], stop_token_ids=stop, logit_bias={token_id: 100.0})
        assert alone(model, ended) == [token_id]
        assert ended.finish_reason == "stop"
    other = greedy(PROMPTS[0], stop_token_ids=stop, logit_bias={7: 100.0})
    assert alone(model, other) == [7] * NEW_TOKENS
    assert other.finish_reason == "length"


def test_an_end_on_the_very_last_token_counts_as_an_end(model: LanguageModel) -> None:
    sequence = greedy(PROMPTS[0], new_tokens=1, stop_token_ids=frozenset({2}), logit_bias={2: 100.0})
    assert alone(model, sequence) == [2]
    assert sequence.finish_reason == "stop"


def test_seeds_reproduce_and_do_not_depend_on_neighbours(model: LanguageModel) -> None:
    expected = [alone(model, sampled(row)) for row in range(len(PROMPTS))]
    backwards = [sampled(row) for row in reversed(range(len(PROMPTS)))]
    decode_all(model, backwards)
    assert [sequence.token_ids for sequence in reversed(backwards)] == expected
    assert all(alone(model, sampled(row, seed=1)) != tokens_ for row, tokens_ in enumerate(expected))
    unseeded = [Decoding(PROMPTS[0], SamplingParams(NEW_TOKENS)) for _ in range(2)]
    decode_all(model, unseeded)
    assert unseeded[0].token_ids != unseeded[1].token_ids


def test_rows_of_different_adapters_share_a_batch(model: LanguageModel) -> None:
    add_adapter(model, "a", seed=1)
    add_adapter(model, "b", seed=2, shape=LoraShape(2, 8))
    names = [None, "a", "b", "a", None]
    expected = [alone(model, greedy(PROMPTS[row], adapter=name)) for row, name in enumerate(names)]
    mixed = [greedy(PROMPTS[row], adapter=name) for row, name in enumerate(names)]
    decode_all(model, mixed)
    assert [sequence.token_ids for sequence in mixed] == expected
    assert expected[1] != alone(model, greedy(PROMPTS[1]))


def test_a_folded_adapter_decodes_as_the_unfolded_one(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    add_adapter(model, "a", seed=1)
    unfolded = [sampled(row, adapter="a") for row in range(len(PROMPTS))]
    decode_all(model, unfolded)
    folded = [sampled(row, adapter="a") for row in range(len(PROMPTS))]
    uses: list[str | None] = []
    with model.adapters.use("a", fold=True):
        monkeypatch.setattr(model.adapters, "use", watched(model.adapters.use, uses.append))
        decode_all(model, folded)
    assert [s.token_ids for s in folded] == [s.token_ids for s in unfolded]
    assert uses == []  # the fold was used, not undone row by row


@pytest.mark.parametrize("adapter", [None, "a"])
def test_recorded_logprobs_are_those_of_a_plain_forward(model: LanguageModel, plain: PlainModel, adapter: str | None) -> None:
    factors = in_float64(add_adapter(model, "a", seed=1)) if adapter else None
    options: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "logit_bias": {5: 1.0}, "presence_penalty": 0.5}  # none of them counts
    sequences = [Decoding(prompt, SamplingParams(8, logprobs=count, **options), adapter) for count, prompt in enumerate(PROMPTS[:4])]
    silent = Decoding(PROMPTS[4], SamplingParams(8, **options), adapter)
    decode_all(model, [*sequences, silent])
    for count, sequence in enumerate(sequences):
        logps = plain.completion_logps(sequence.prompt_ids, sequence.token_ids, factors, 2.0)
        assert sequence.logprobs == pytest.approx([float(logps[i, t]) for i, t in enumerate(sequence.token_ids)], abs=1e-4)
        likeliest = logps.topk(count, dim=-1) if count else None
        for position, alternatives in enumerate(sequence.top_logprobs):
            assert list(alternatives) == ([] if likeliest is None else likeliest.indices[position].tolist())
            assert list(alternatives.values()) == pytest.approx([] if likeliest is None else likeliest.values[position].tolist(), abs=1e-4)
    assert (silent.logprobs, silent.top_logprobs) == ([], [])


@pytest.mark.parametrize("adapter", [None, "a"])
def test_score_equals_a_plain_forward(model: LanguageModel, plain: PlainModel, adapter: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "CHUNK_ELEMENTS", 70 * model.network.config.vocab_size)
    factors = in_float64(add_adapter(model, "a", seed=1)) if adapter else None
    ids = tokens(9, 300)  # more than one chunk of 70
    own, alternatives = score(model, ids, adapter, top=3)
    logps = plain.completion_logps(ids[:1], ids[1:], factors, 2.0)
    assert own == pytest.approx([float(logps[i, t]) for i, t in enumerate(ids[1:])], abs=2e-4)
    expected = logps.topk(3, dim=-1)
    assert [list(each) for each in alternatives] == expected.indices.tolist()
    assert [value for each in alternatives for value in each.values()] == pytest.approx(expected.values.flatten().tolist(), abs=2e-4)
    assert score(model, ids, adapter) == (own, [])


def test_score_agrees_with_what_decoding_recorded(model: LanguageModel) -> None:
    sequence = Decoding(PROMPTS[1], SamplingParams(16, seed=1, logprobs=0))
    decode_all(model, [sequence])
    own, _ = score(model, sequence.prompt_ids + sequence.token_ids, None)
    assert sequence.logprobs == pytest.approx(own[len(sequence.prompt_ids) - 1 :], abs=1e-4)
