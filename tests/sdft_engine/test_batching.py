"""sdft_engine.batching: every row in exactly one pass within the budget, and hidden states that padding doesn't change."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdft_engine import batching
from sdft_engine.batching import ScoredText, completion_hidden_states, passes, shared_prefix_length
from sdft_engine.model import LanguageModel
from tests.sdft_engine.plain import PlainModel, add_adapter, in_float64, tokens
from tests.sdft_engine.recording import watched

LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), max_size=30)


def text(prompt_length: int, completion_length: int, seed: int = 0) -> ScoredText:
    return ScoredText(tokens(seed, prompt_length), tokens(seed + 1, completion_length))


def test_the_last_completion_token_is_not_read() -> None:
    assert text(5, 3).input_length == 7


@given(lengths=LENGTHS, budget=st.integers(1, 400))
def test_passes_cover_each_row_once_within_the_budget(lengths: list[tuple[int, int]], budget: int) -> None:
    texts = [text(*pair) for pair in lengths]
    found = list(passes(texts, budget))
    assert sorted(row for rows in found for row in rows) == list(range(len(texts)))
    for rows in found:
        assert len(rows) == 1 or len(rows) * max(texts[row].input_length for row in rows) <= budget


@given(lengths=LENGTHS, budget=st.integers(1, 400))
def test_passes_are_filled_with_rows_of_similar_length(lengths: list[tuple[int, int]], budget: int) -> None:
    texts = [text(*pair) for pair in lengths]
    found = list(passes(texts, budget))
    ordered = [texts[row].input_length for rows in found for row in rows]
    assert ordered == sorted(ordered)
    for rows, following in itertools.pairwise(found):
        assert (len(rows) + 1) * texts[following[0]].input_length > budget


def test_one_pass_where_all_fits() -> None:
    assert list(passes([text(4, 3), text(2, 3), text(3, 3)], 18)) == [[1, 2, 0]]
    assert list(passes([text(4, 3), text(2, 3), text(3, 3)], 17)) == [[1, 2], [0]]
    assert list(passes([], 100)) == []


def test_right_padding_changes_no_hidden_state(model: LanguageModel) -> None:
    texts = [text(9, 4, 1), text(1, 1, 2), text(3, 12, 3), text(20, 1, 4)]
    together = completion_hidden_states(model, texts)
    alone = torch.cat([completion_hidden_states(model, [each]) for each in texts])
    assert together.shape == (4 + 1 + 12 + 1, 64)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", [None, "student"])
def test_hidden_states_predict_the_completion(model: LanguageModel, plain: PlainModel, adapter: str | None) -> None:
    factors = in_float64(add_adapter(model, "student", seed=1)) if adapter else None
    texts = [text(9, 4, 1), text(3, 12, 3)]
    with model.adapters.use(adapter):
        logps = model.logits(completion_hidden_states(model, texts)).log_softmax(dim=-1)
    expected = torch.cat([plain.completion_logps(each.prompt_ids, each.completion_ids, factors, 2.0) for each in texts])
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-4)


def sharing(prefix: int, lengths: list[tuple[int, int]]) -> list[ScoredText]:
    """Texts whose prompts begin with the same `prefix` tokens."""
    texts = [text(*pair, seed=10 * row) for row, pair in enumerate(lengths)]
    return [ScoredText(tokens(99, prefix) + each.prompt_ids, each.completion_ids) for each in texts]


def test_how_much_is_shared() -> None:
    def shared(*texts: ScoredText) -> int:
        return shared_prefix_length([each.prompt_ids for each in texts])

    assert shared(*sharing(40, [(3, 2), (5, 2), (4, 1)])) == 40
    assert shared(*sharing(40, [(3, 2)])) == 0  # nobody to share with
    assert shared(*sharing(20, [(3, 2), (5, 2)])) == 0  # not worth a pass
    same = ScoredText(tokens(1, 60), [5, 6])
    assert shared(same, same) == 59  # the last prompt token predicts the first completion token
    assert shared(same, ScoredText(same.prompt_ids[:50], [7])) == 49


@pytest.mark.parametrize("adapter", [None, "student"])
def test_a_shared_prefix_is_computed_once_and_changes_no_number(model: LanguageModel, adapter: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if adapter:
        add_adapter(model, adapter, seed=1, trainable=True)
    texts = sharing(40, [(3, 4), (9, 1), (1, 12), (6, 3)])
    read: list[tuple[int, ...]] = []
    with model.adapters.use(adapter):
        alone = torch.cat([completion_hidden_states(model, [each]) for each in texts])
        with monkeypatch.context() as patch:
            patch.setattr(model, "hidden_states", watched(model.hidden_states, lambda ids, **_: read.append(tuple(ids.shape))))
            together = completion_hidden_states(model, texts)
    assert read == [(1, 40), (4, 12)]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_gradients_flow_through_a_shared_prefix(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = add_adapter(model, "student", seed=1, trainable=True)
    texts = sharing(40, [(3, 4), (9, 1), (1, 12), (6, 3)])
    weights = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        with model.adapters.use("student"):
            loss = (completion_hidden_states(model, texts) * weights).sum()
        return list(torch.autograd.grad(loss, list(factors.values())))

    shared = gradients()
    monkeypatch.setattr(batching, "LEAST_SHARED_TOKENS", 10**9)
    for mine, expected in zip(shared, gradients(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
        assert expected.abs().max() > 1e-3
