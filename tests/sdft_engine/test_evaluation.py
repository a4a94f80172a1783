"""sdft_engine.evaluation: pass@k by hand, teacher lift and distances against the plain model."""

import itertools

import pytest

from sdft_engine.batching import ScoredText
from sdft_engine.evaluation import TeacherLift, check_in_context, greedy_answers, mean_token_kl, pass_at_k
from sdft_engine.generation import decode_all
from sdft_engine.lora import LoraShape
from sdft_engine.model import LanguageModel
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.seeds import seed_of
from tests.sdft_engine.plain import PlainModel, add_adapter, in_float64, tokens

SHAPE = LoraShape(rank=3, alpha=6)


@pytest.mark.parametrize(("n", "right", "k", "expected"), [(5, 0, 3, 0.0), (5, 5, 1, 1.0), (5, 2, 1, 0.4), (5, 2, 2, 0.7), (5, 2, 4, 1.0), (10, 1, 5, 0.5)])
def test_pass_at_k_by_hand(n: int, right: int, k: int, expected: float) -> None:
    assert pass_at_k(n, right, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "right", "k"), list(itertools.product([6], [0, 1, 3, 6], [1, 2, 5, 6])))
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n: int, right: int, k: int) -> None:
    answers = [True] * right + [False] * (n - right)
    choices = list(itertools.combinations(answers, k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


@pytest.mark.parametrize(("n", "right", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6), (0, 0, 1)])
def test_pass_at_k_of_impossible_counts_is_refused(n: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, right, k)


def test_teacher_lift_counts() -> None:
    lift = TeacherLift(n=10, both=3, teacher_only=4, student_only=1)
    assert (lift.teacher_right, lift.student_right, lift.lift) == (7, 4, 0.3)


@pytest.mark.parametrize("max_tokens", [4096, 30])
def test_mean_token_kl_is_the_plain_one(model: LanguageModel, plain: PlainModel, max_tokens: int) -> None:
    add_adapter(model, "one", seed=1, shape=SHAPE)
    factors = in_float64(model.adapters.parameters("one"))
    first = [ScoredText(tokens(row, 9 + row), tokens(20 + row, 4 + 2 * row)) for row in range(3)]
    second = [ScoredText(tokens(40 + row, 5), text.completion_ids) for row, text in enumerate(first)]
    total = 0.0
    for a, b in zip(first, second, strict=True):
        p = plain.completion_logps(a.prompt_ids, a.completion_ids, factors, SHAPE.scaling)
        q = plain.completion_logps(b.prompt_ids, b.completion_ids)
        total += float((p.exp() * (p - q)).sum())
    assert mean_token_kl(model, first, "one", second, None, max_tokens) == pytest.approx(total / (4 + 6 + 8), rel=1e-3)
    assert mean_token_kl(model, first, None, first, None, max_tokens) == pytest.approx(0, abs=1e-9)


def test_the_check_compares_greedy_answers_and_distances_from_the_base(model: LanguageModel, plain: PlainModel) -> None:
    add_adapter(model, "tuned", seed=2, shape=SHAPE)
    factors = in_float64(model.adapters.parameters("tuned"))
    prompts, shown = [tokens(row, 6) for row in range(4)], [tokens(row, 6) + tokens(70 + row, 5) for row in range(4)]
    own = [model.chat_format.decode(answer) for answer in greedy_answers(model, prompts, None, 6)]
    taught = [model.chat_format.decode(answer) for answer in greedy_answers(model, shown, None, 6)]
    assert all(a != b for a, b in zip(own, taught, strict=True))
    accepted = [{own[0], taught[0]}, {taught[1]}, {own[2]}, {taught[3]}]
    found = check_in_context(model, prompts, shown, lambda row, answer: answer in accepted[row], max_new_tokens=6, compared="tuned", temperature=0.8, seed=5)
    assert found.lift == TeacherLift(n=4, both=1, teacher_only=2, student_only=1)

    def expected(sampled_after: list[list[int]], adapter: str | None) -> float:
        total, count = 0.0, 0
        for row, (prompt, base_prompt) in enumerate(zip(sampled_after, prompts, strict=True)):
            params = SamplingParams(6, 0.8, seed=seed_of(5, "check", row), stop_token_ids=model.chat_format.eos_token_ids)
            answer = Decoding(prompt, params, adapter)
            decode_all(model, [answer])
            p = plain.completion_logps(prompt, answer.token_ids, factors if adapter else None, SHAPE.scaling)
            q = plain.completion_logps(base_prompt, answer.token_ids)
            total += float((p.exp() * (p - q)).sum())
            count += len(answer.token_ids)
        return total / count

    assert found.teacher_kl == pytest.approx(expected(shown, None), rel=1e-3)
    assert found.compared_kl == pytest.approx(expected(prompts, "tuned"), rel=1e-3)
    assert check_in_context(model, prompts, shown, lambda row, answer: False, max_new_tokens=2).compared_kl is None


def test_what_can_not_be_checked_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="as many prompts as teacher prompts"):
        check_in_context(model, [], [], lambda row, answer: True, max_new_tokens=3)
    with pytest.raises(ValueError, match="no adapter 'nope' in memory"):
        check_in_context(model, [[1]], [[1]], lambda row, answer: True, max_new_tokens=3, compared="nope")
