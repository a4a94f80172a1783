"""What a step's gradient measured on the way, and how the shares of several processes become the whole batch's."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any


def _rows_of_all(shares: Sequence[dict[int, Any]]) -> dict[int, Any]:
    """By the rollout's position in the whole batch, which was dealt out one rollout at a time (see ranks.py)."""
    return {place * len(shares) + rank: value for rank, share in enumerate(shares) for place, value in share.items()}


SUMMED: Any = {"rule": sum}
LARGEST: Any = {"rule": max}
BY_ROW: Any = {"rule": _rows_of_all}


@dataclass
class TokenStatistics:
    """Sums and extremes over the loss tokens of a step, filled chunk by chunk. Seconds are those of the slowest process."""

    loss: float = field(default=0.0, metadata=SUMMED)
    loss_tokens: int = field(default=0, metadata=SUMMED)
    correct_tokens: int = field(default=0, metadata=SUMMED)
    entropy_sum: float = field(default=0.0, metadata=SUMMED)
    divergence_max: float = field(default=0.0, metadata=LARGEST)
    ratio_sum: float = field(default=0.0, metadata=SUMMED)
    """Importance ratios; of the trainer's own rollouts none."""
    top_k_mass_sum: float = field(default=0.0, metadata=SUMMED)
    teacher_seconds: float = field(default=0.0, metadata=LARGEST)
    student_seconds: float = field(default=0.0, metadata=LARGEST)
    per_token: dict[int, list[float]] = field(default_factory=dict, metadata=BY_ROW)
    """Divergence of every completion token, by the rollout's position in the batch."""
    rewards: dict[int, float] = field(default_factory=dict, metadata=BY_ROW)
    """Implicit reward of every rollout, likewise: over its loss tokens, the sum of log P(y_t) - log Q(y_t)."""


def merged(shares: Sequence[TokenStatistics]) -> TokenStatistics:
    """The statistics of a whole batch from those of its shares, in the order of the processes."""
    return TokenStatistics(**{each.name: each.metadata["rule"]([getattr(share, each.name) for share in shares]) for each in fields(TokenStatistics)})
