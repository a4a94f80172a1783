"""What a step of self-distillation says about itself, from its rollouts and their scores."""

import re

from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.rollouts import Rollout
from sdft_engine.token_statistics import TokenStatistics

Measurements = dict[str, float | None]

TEACHER_OPENING = re.compile(
    r"\W*(based on|according to|as (shown|given|seen|stated|mentioned|described) in|as in|like|following|from|similar to) "
    r"(the|this|that|your|my) (\w+ )?(example|demonstration|response|answer|attempt|feedback|information|context|document|text)\b",
    re.IGNORECASE,
)
"""Openings that make sense only to someone who was shown something: a student that uses them repeats its teacher's habits."""


def rollout_measurements(
    chat_format: ChatFormat, rollouts: list[Rollout], masks: list[list[bool]], statistics: TokenStatistics, answer_starts: list[int] | None
) -> Measurements:
    """Names as in StepMetrics."""
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    first = [value for row, mask in enumerate(masks) for value in statistics.per_token[row][: mask.index(True) if True in mask else 0]]
    finished = sum(rollout.finished for rollout in rollouts)
    count = statistics.loss_tokens
    corrected = any(rollout.sampler_logps is not None for rollout in rollouts)
    openings = [chat_format.decode(rollout.completion_ids[start:]) for rollout, start in zip(rollouts, answer_starts or [0] * len(rollouts), strict=True)]
    return {
        "divergence_max": statistics.divergence_max,
        "divergence_first_tokens": sum(first) / len(first) if first else None,
        "implicit_reward": sum(statistics.rewards.values()) / len(rollouts),
        "importance_ratio": statistics.ratio_sum / count if count and corrected else None,
        "top_k_mass": statistics.top_k_mass_sum / count if count and statistics.top_k_mass_sum else None,
        "completion_tokens_mean": sum(lengths) / len(lengths),
        "thinking_tokens_mean": sum(answer_starts) / len(answer_starts) if answer_starts else None,
        "clipped_ratio": 1 - finished / len(rollouts),
        "eos_ratio": finished / len(rollouts),
        "teacher_opening_ratio": sum(TEACHER_OPENING.match(opening) is not None for opening in openings) / len(rollouts),
    }


def speeds(rollouts: list[Rollout], rollout_seconds: float, statistics: TokenStatistics) -> Measurements:
    """Tokens per second of each phase: sampled ones, and those that teacher and student read, prompts included."""
    sampled = sum(len(rollout.completion_ids) for rollout in rollouts)
    return {
        "rollout_seconds": rollout_seconds,
        "rollout_tokens_per_second": sampled / rollout_seconds,
        "teacher_seconds": statistics.teacher_seconds,
        "teacher_tokens_per_second": (sampled + sum(len(rollout.teacher_prompt_ids) for rollout in rollouts)) / statistics.teacher_seconds,
        "student_tokens_per_second": (sampled + sum(len(rollout.student_prompt_ids) for rollout in rollouts)) / statistics.student_seconds,
    }
