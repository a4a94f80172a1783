"""sdft_engine.rollouts: the same seed, step and row give the same tokens in any batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_engine.generation import decode_all
from sdft_engine.lora import STUDENT, LoraShape
from sdft_engine.model import LanguageModel
from sdft_engine.rollouts import Rollout, sample_rollouts, write_rollouts
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.seeds import seed_of
from sdft_engine.token_statistics import TokenStatistics
from tests.sdft_engine.plain import add_adapter, randomise, tokens

STUDENT_PROMPTS = [tokens(seed, 3 + 7 * seed) for seed in range(5)]
TEACHER_PROMPTS = [tokens(50 + seed, 9) for seed in range(5)]
ALL = [0, 1, 2, 3, 4]


@pytest.fixture
def student(model: LanguageModel) -> LanguageModel:
    add_adapter(model, STUDENT, seed=1, shape=LoraShape(3, 6), trainable=True)
    return model


def roll_out(model: LanguageModel, rows: list[int], **options: Any) -> dict[int, Rollout]:
    chosen = {"max_completion_tokens": 12, "temperature": 1.0, "seed": 3, "step": 1} | options
    return {rollout.row: rollout for rollout in sample_rollouts(model, rows, STUDENT_PROMPTS, TEACHER_PROMPTS, **chosen)}


def ids(rollouts: dict[int, Rollout]) -> dict[int, list[int]]:
    return {row: rollouts[row].completion_ids for row in sorted(rollouts)}


def test_tokens_do_not_depend_on_the_rest_of_the_batch(student: LanguageModel) -> None:
    together = ids(roll_out(student, ALL))
    assert len({tuple(completion) for completion in together.values()}) == 5
    assert ids(roll_out(student, [4, 2, 0, 3, 1])) == together
    for rows in ([3], [1, 4], [2, 0, 1]):
        assert ids(roll_out(student, rows)) == {row: together[row] for row in sorted(rows)}


@pytest.mark.parametrize("changed", [{"seed": 4}, {"step": 2}, {"temperature": 3.0}])
def test_another_seed_step_or_temperature_gives_other_tokens(student: LanguageModel, changed: dict[str, Any]) -> None:
    assert all(
        completion != other for completion, other in zip(ids(roll_out(student, ALL)).values(), ids(roll_out(student, ALL, **changed)).values(), strict=True)
    )


def test_the_students_prompt_is_answered_and_not_the_teachers(student: LanguageModel) -> None:
    stop = student.chat_format.eos_token_ids
    expected = [Decoding(prompt, SamplingParams(12, 1.0, seed=seed_of(3, 1, row), stop_token_ids=stop), STUDENT) for row, prompt in enumerate(STUDENT_PROMPTS)]
    decode_all(student, expected)
    assert list(ids(roll_out(student, ALL)).values()) == [sequence.token_ids for sequence in expected]


def test_the_student_of_this_moment_answers(student: LanguageModel) -> None:
    """On-policy: an answer changes as soon as the weights do, and it is not the base's."""
    before = ids(roll_out(student, ALL))
    randomise(student.adapters, STUDENT, seed=2)
    after = ids(roll_out(student, ALL))
    randomise(student.adapters, STUDENT, seed=2, strength=0.0)
    base = ids(roll_out(student, ALL))
    assert all(before[row] != after[row] != base[row] != before[row] for row in ALL)


def test_folding_changes_no_token(student: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = ids(roll_out(student, ALL))
    monkeypatch.setattr(LanguageModel, "folds_adapters", False)
    assert ids(roll_out(student, ALL)) == folded
    assert (student.adapters.routing.active, student.adapters.routing.folded) == (None, None)


def test_an_answer_ends_at_every_end_token_or_is_marked_as_cut_off(student: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = student.chat_format.eos_token_ids
    likelier = torch.zeros(512)
    likelier[sorted(stop)] = 4.0
    logits = student.logits
    monkeypatch.setattr(student, "logits", lambda hidden: logits(hidden) + likelier)
    rollouts = [rollout for step in range(4) for rollout in roll_out(student, ALL, step=step, max_completion_tokens=5).values()]
    assert {rollout.completion_ids[-1] for rollout in rollouts if rollout.finished} == stop
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert not stop & set(rollout.completion_ids[:-1])
        assert rollout.finished == (rollout.completion_ids[-1] in stop)
        assert rollout.finished or len(rollout.completion_ids) == 5
        assert rollout.student_prompt_ids == STUDENT_PROMPTS[rollout.row]
        assert rollout.teacher_prompt_ids == TEACHER_PROMPTS[rollout.row]


def test_rollouts_are_written_with_their_divergence(student: LanguageModel, tmp_path: Path) -> None:
    completion = student.chat_format.encode("The red lamp, é.<|im_end|>")
    rollouts = [Rollout(7, [1], [2], completion, True), Rollout(2, [1], [2], completion[:3], False)]
    path = tmp_path / "rollouts" / "step_000001.jsonl"
    statistics = TokenStatistics(per_token={0: [0.123456789] * len(completion), 1: [1.0, 2.0, 3.0]}, rewards={0: -1.5, 1: 0.123456789})
    write_rollouts(path, student, rollouts, statistics)
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["row"], first["completion"], first["finished"]) == (7, "The red lamp, é.", True)
    assert first["tokens"] == [student.chat_format.tokenizer.id_to_token(token) for token in completion]
    assert first["per_token_divergence"] == [0.12346] * len(completion)
    assert (first["implicit_reward"], second["implicit_reward"]) == (-1.5, 0.12346)
    assert (second["row"], second["finished"], second["per_token_divergence"]) == (2, False, [1.0, 2.0, 3.0])


def test_last_answers_are_drafts_and_change_nothing(student: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    read = student.hidden_states

    def reading(input_ids: Any, **inputs: Any) -> Any:
        passes.append(1)
        return read(input_ids, **inputs)

    monkeypatch.setattr(student, "hidden_states", reading)
    expected = ids(roll_out(student, ALL))
    without = len(passes)
    assert ids(roll_out(student, ALL, drafts=expected)) == expected
    assert len(passes) - without < without
