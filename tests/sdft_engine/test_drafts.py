"""sdft_engine.drafts and how a batch uses them: the same tokens with any guess, in fewer passes with a good one."""

from typing import Any

import pytest

from sdft_engine.drafts import MOST_TOKENS, ROWS_OF_A_PASS, TRIAL, DraftLuck, next_tokens
from sdft_engine.generation import DecodingBatch, decode_all
from sdft_engine.model import LanguageModel
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.seeds import seed_of
from tests.sdft_engine.plain import tokens

PROMPTS = [tokens(row, length) for row, length in enumerate((9, 4, 12, 7))]
STOP = frozenset(range(20, 30))


@pytest.mark.parametrize(
    ("said", "count", "expected"),
    [
        ([], 3, [1, 2, 3]),
        ([1, 2], 3, [3, 4, 2]),
        ([1, 2, 3, 4, 2, 5], 3, []),
        ([1, 2, 3, 4, 2], 3, [5]),
        ([9, 3], 2, [4, 2]),  # it said something else, and then a token of the draft
        ([9, 4, 2], 2, [5]),  # the longer context decides which 2 is meant
        ([7], 3, []),
        ([1], 0, []),
        ([1], -1, []),
    ],
)
def test_what_follows_in_the_draft(said: list[int], count: int, expected: list[int]) -> None:
    assert next_tokens([1, 2, 3, 4, 2, 5], said, count) == expected


def test_no_draft_proposes_nothing() -> None:
    assert next_tokens([], [1], 5) == []


def test_fewer_tokens_the_more_rows_there_are_and_none_after_bad_luck() -> None:
    assert [DraftLuck().width(rows) for rows in (1, 8, ROWS_OF_A_PASS // 2, ROWS_OF_A_PASS, 1000)] == [MOST_TOKENS, ROWS_OF_A_PASS // 8 - 1, 1, 0, 0]
    luck = DraftLuck()
    luck.observe(TRIAL - 1, 0)
    assert luck.width(1) == MOST_TOKENS
    luck.observe(1, 0)
    assert luck.width(1) == 0
    luck.observe(TRIAL, TRIAL)
    assert luck.width(1) == MOST_TOKENS


def answers(model: LanguageModel, drafts: list[list[int]] | None, **options: Any) -> list[Decoding]:
    made = [
        Decoding(
            prompt, SamplingParams(**({"max_new_tokens": 30, "seed": seed_of(3, row), "stop_token_ids": STOP} | options)), draft=drafts[row] if drafts else []
        )
        for row, prompt in enumerate(PROMPTS)
    ]
    decode_all(model, made)
    return made


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"temperature": 0.3, "top_p": 0.8, "logprobs": 2, "frequency_penalty": 0.4}, {"max_new_tokens": 1}]
)
@pytest.mark.parametrize("quality", ["perfect", "wrong", "half", "some", "too_long"])
def test_the_answer_does_not_depend_on_the_draft(model: LanguageModel, quality: str, options: dict[str, Any]) -> None:
    expected = answers(model, None, **options)
    own = [each.token_ids for each in expected]
    drafts = {
        "perfect": own,
        "wrong": [[9] * len(ids) for ids in own],
        "half": [[*ids[: len(ids) // 2], 9, *ids[len(ids) // 2 :]] for ids in own],
        "some": [ids if row % 2 else [] for row, ids in enumerate(own)],
        "too_long": [ids + ids for ids in own],
    }[quality]
    found = answers(model, drafts, **options)
    assert [each.token_ids for each in found] == own
    assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert len({len(ids) for ids in own}) > 1 or options.get("max_new_tokens") == 1, "rows must end at different steps"


def test_good_drafts_need_fewer_passes(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = list[int]()
    read = model.hidden_states

    def reading(input_ids: Any, **inputs: Any) -> Any:
        passes.append(input_ids.shape[1])
        return read(input_ids, **inputs)

    monkeypatch.setattr(model, "hidden_states", reading)
    own = [each.token_ids for each in answers(model, None, stop_token_ids=frozenset())]
    plain = len(passes)
    passes.clear()
    answers(model, own, stop_token_ids=frozenset())
    assert len(passes) * 3 < plain
    passes.clear()
    answers(model, [[9] * 30] * 4, stop_token_ids=frozenset())
    assert len(passes) <= plain
    assert passes.count(1) > plain - 12, "a draft that says nothing of the kind is no draft"
    misleading = [[token for each in ids for token in (each, 9)] for ids in own]  # finds its place every time, and is wrong
    passes.clear()
    answers(model, misleading, stop_token_ids=frozenset())
    assert passes.count(1) > plain - 12, "after some bad luck it decodes one by one"


def test_sequences_with_and_without_drafts_join_and_leave(model: LanguageModel) -> None:
    expected = [each.token_ids for each in answers(model, None)]
    batch = DecodingBatch(model)
    made = [
        Decoding(prompt, SamplingParams(30, seed=seed_of(3, row), stop_token_ids=STOP), draft=expected[row] if row != 1 else [])
        for row, prompt in enumerate(PROMPTS)
    ]
    batch.add(made[:2])
    batch.step()
    batch.add(made[2:])
    while batch.active:
        batch.step()
    assert [each.token_ids for each in made] == expected


def test_families_whose_attention_may_be_a_window_decode_one_by_one(model: LanguageModel) -> None:
    own = [each.token_ids for each in answers(model, None)]
    model.fused = None
    batch = DecodingBatch(model)
    batch.add([Decoding(PROMPTS[0], SamplingParams(30, seed=seed_of(3, 0)), draft=own[0])])
    batch.step()
    assert len(batch.active[0].token_ids) == 2
