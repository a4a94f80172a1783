"""sdft_engine.prompt_cache: the same states as reading the whole texts, each prompt read once, the budget kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_engine.batching import ScoredText, completion_hidden_states
from sdft_engine.divergences import TokenLoss
from sdft_engine.lora import STUDENT, LoraShape
from sdft_engine.model import LanguageModel
from sdft_engine.prompt_cache import PromptCache
from sdft_engine.rollouts import Rollout
from sdft_engine.session import open_session
from sdft_engine.step import Objective, PassBudget, sdft_gradient
from sdft_engine.teacher import TEACHER
from sdft_engine.trainer import train
from tests.sdft_engine.plain import add_adapter, tokens
from tests.sdft_engine.recording import watched
from tests.sdft_engine.runs import make_run

PROMPTS = [tokens(row, length) for row, length in enumerate((9, 1, 14, 14, 3))]
TEXTS = [ScoredText(prompt, tokens(50 + row, 2 + 3 * row)) for row, prompt in enumerate(PROMPTS)]
BYTES_A_TOKEN = 2 * 2 * 2 * 16 * 4
"""Of the tiny model: keys and values, two layers, two heads of 16, float32."""


@pytest.fixture
def taught(model: LanguageModel) -> LanguageModel:
    add_adapter(model, TEACHER, seed=2, shape=LoraShape(3, 6))
    return model


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 0], [1], [2, 3], [3]])
@torch.no_grad()
def test_the_states_are_those_of_the_whole_texts(taught: LanguageModel, rows: list[int]) -> None:
    cache = PromptCache(PROMPTS)
    texts = [TEXTS[row] for row in rows]
    with taught.adapters.use(TEACHER):
        for _ in range(2):
            found = cache.completion_hidden_states(taught, rows, texts)
            torch.testing.assert_close(found, torch.cat([completion_hidden_states(taught, [text]) for text in texts]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_prompt_is_read_once(taught: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, widths, read = PromptCache(PROMPTS), list[int](), taught.hidden_states

    def reading(input_ids: Any, **inputs: Any) -> Any:
        widths.append(input_ids.numel())
        return read(input_ids, **inputs)

    monkeypatch.setattr(taught, "hidden_states", reading)
    with taught.adapters.use(TEACHER):
        cache.completion_hidden_states(taught, [0, 2], [TEXTS[0], TEXTS[2]])
        cache.completion_hidden_states(taught, [2, 4], [TEXTS[2], TEXTS[4]])
    assert widths == [8, 13, 2 * 8, 2, 2 * 14]


def test_states_of_a_row_are_the_same_bits_whenever_it_was_read(taught: LanguageModel) -> None:
    early, late = PromptCache(PROMPTS), PromptCache(PROMPTS)
    with taught.adapters.use(TEACHER):
        early.completion_hidden_states(taught, [0, 1, 2], TEXTS[:3])
        late.completion_hidden_states(taught, [4], [TEXTS[4]])
        rows, texts = [2, 4], [TEXTS[2], TEXTS[4]]
        assert torch.equal(early.completion_hidden_states(taught, rows, texts), late.completion_hidden_states(taught, rows, texts))


@pytest.mark.parametrize(("tokens_kept", "kept"), [(0, []), (7, []), (8, [0, 1]), (20, [0, 1]), (21, [0, 1, 2]), (1000, [0, 1, 2, 3, 4])])
def test_the_budget_is_given_to_the_first_prompts(taught: LanguageModel, tokens_kept: int, kept: list[int]) -> None:
    cache = PromptCache(PROMPTS, budget_bytes=tokens_kept * BYTES_A_TOKEN)
    assert [row for row in reversed(range(5)) if cache.keeps(taught, row)] == kept[::-1]


@pytest.mark.parametrize("budget", [0, 21 * BYTES_A_TOKEN, 1 << 30])
def test_the_step_is_the_same_with_and_without_it(taught: LanguageModel, budget: int) -> None:
    student = add_adapter(taught, STUDENT, seed=1, shape=LoraShape(3, 6), trainable=True)
    rollouts = [Rollout(row, tokens(80 + row, 5), PROMPTS[row], TEXTS[row].completion_ids, True) for row in (3, 0, 4, 1, 2)]
    masks = [[True] * len(each.completion_ids) for each in rollouts]
    found = []
    for cache in (None, PromptCache(PROMPTS, budget)):
        statistics = sdft_gradient(taught, rollouts, masks, TEACHER, Objective(TokenLoss()), PassBudget(), prompt_cache=cache)
        found.append([torch.tensor(statistics.loss), *(factor.grad for factor in student.values())])
        for factor in student.values():
            factor.grad = None
    for expected, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("teacher", "n_epochs", "kept"), [("frozen", 4, True), ("frozen", 1, False), ("ema", 4, False), ("live", 4, False)])
def test_only_a_teacher_that_reads_the_same_again_keeps_its_prompts(teacher: str, n_epochs: int, kept: bool, tmp_path: Path, tiny_model_dir: Path) -> None:
    session = open_session(make_run(tmp_path / "run", tiny_model_dir, teacher=teacher, n_epochs=n_epochs))
    assert (session.prompt_cache is not None) is kept


def test_a_run_with_a_frozen_teacher_reads_each_prompt_once(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, rows=3, batch_size=3, n_epochs=3, teacher="frozen")
    read: list[list[int]] = []
    monkeypatch.setattr(PromptCache, "_read", watched(PromptCache._read, lambda cache, model, ids: read.append(ids)))
    assert train(run).outcome == "succeeded"
    assert len([ids for ids in read if len(ids) > 1]) == 3  # one of a single token measures what a token takes
