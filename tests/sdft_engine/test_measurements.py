"""sdft_engine.measurements: which openings betray the teacher, and shares over a batch."""

from pathlib import Path

import pytest

from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.measurements import TEACHER_OPENING, rollout_measurements, speeds
from sdft_engine.rollouts import Rollout
from sdft_engine.token_statistics import TokenStatistics


@pytest.mark.parametrize(
    "text",
    [
        "Based on the example, the answer is 4.",
        '  "According to the information above',
        "As shown in the previous example",
        "as in your demonstration,",
        "Following the feedback",
        "Similar to the earlier response: yes",
    ],
)
def test_openings_of_one_who_was_shown_something(text: str) -> None:
    assert TEACHER_OPENING.match(text)


@pytest.mark.parametrize(
    "text", ["The example shows", "Paris.", "Based on my experience", "Like the sun, it is hot.", "An answer, from the example", "From the texture"]
)
def test_other_openings(text: str) -> None:
    assert not TEACHER_OPENING.match(text)


def test_means_over_the_loss_tokens(tiny_model_dir: Path) -> None:
    """A row without a loss token has no first tokens: nothing is left out before anything."""
    chat = ChatFormat.from_directory(tiny_model_dir)
    rollouts = [Rollout(row, [1], [2, 3], [5, 6, 7], finished=True, sampler_logps=[-1.0] * 3) for row in range(2)]
    statistics = TokenStatistics(loss_tokens=2, ratio_sum=3.0, top_k_mass_sum=1.5, per_token={0: [8.0, 1.0, 1.0], 1: [50.0] * 3}, rewards={0: 1.0, 1: 0.0})
    found = rollout_measurements(chat, rollouts, [[False, True, True], [False] * 3], statistics, None)
    assert (found["importance_ratio"], found["top_k_mass"], found["divergence_first_tokens"]) == (1.5, 0.75, 8.0)


def test_speeds_count_what_each_phase_reads() -> None:
    rollouts = [Rollout(0, [1] * 4, [1] * 10, [1] * 3, finished=True), Rollout(1, [1] * 6, [1] * 20, [1] * 5, finished=True)]
    found = speeds(rollouts, 4.0, TokenStatistics(teacher_seconds=2.0, student_seconds=3.0))
    assert (found["rollout_tokens_per_second"], found["teacher_tokens_per_second"], found["student_tokens_per_second"]) == (2.0, 19.0, 6.0)


def test_shares_over_a_batch(tiny_model_dir: Path) -> None:
    chat = ChatFormat.from_directory(tiny_model_dir)
    thoughts = chat.encode("hm</think>")
    answers = [chat.encode("Based on the example: lamp"), [*thoughts, *chat.encode("As in the example")], chat.encode("A lamp."), chat.encode("red")]
    rollouts = [Rollout(row, [1], [2, 3], answer, finished=row != 3) for row, answer in enumerate(answers)]
    masks = [[offset >= 1 for offset in range(len(answer))] for answer in answers]
    statistics = TokenStatistics(
        per_token={row: [2.0 + row] + [1.0] * (len(answer) - 1) for row, answer in enumerate(answers)}, rewards=dict(enumerate([1.0, 2, 3, 6]))
    )
    statistics.loss_tokens = sum(map(sum, masks))
    plainly = rollout_measurements(chat, rollouts, masks, statistics, None)
    assert (plainly["teacher_opening_ratio"], plainly["clipped_ratio"], plainly["eos_ratio"]) == (0.25, 0.25, 0.75)
    assert (plainly["implicit_reward"], plainly["divergence_first_tokens"], plainly["thinking_tokens_mean"]) == (3.0, 3.5, None)
    assert plainly["importance_ratio"] is plainly["top_k_mass"] is None
    after_thoughts = rollout_measurements(chat, rollouts, masks, statistics, [0, len(thoughts), 0, 0])
    assert after_thoughts["teacher_opening_ratio"] == 0.5
    assert after_thoughts["thinking_tokens_mean"] == len(thoughts) / 4
