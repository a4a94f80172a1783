"""Per-token divergences between teacher P and student Q over the whole vocabulary: pure functions on tensors.

Inputs are log-probabilities (N, V), N positions; outputs are (N,), in nats. Gradients flow to the student only: callers
pass teacher log-probabilities that need none. Equations: METHOD names follow arXiv 2601.19897, section 3 and appendix.
"""

from collections.abc import Callable

from torch import Tensor


def forward_kl(teacher_logps_NV: Tensor, student_logps_NV: Tensor) -> Tensor:
    """KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)). What the paper's released code minimises (its `alpha = 0`)."""
    return (teacher_logps_NV.exp() * (teacher_logps_NV - student_logps_NV)).sum(dim=-1)


def reverse_kl(teacher_logps_NV: Tensor, student_logps_NV: Tensor) -> Tensor:
    """KL(Q || P) = sum_v Q(v) (log Q(v) - log P(v)). The objective of the paper's first version.

    The gradient of the sequence's divergence equals on-policy reinforcement learning with the reward
    log pi(y | x, c) - log pi(y | x); this per-token form on fixed rollouts drops its return-to-go term.
    """
    return (student_logps_NV.exp() * (student_logps_NV - teacher_logps_NV)).sum(dim=-1)


def entropy(logps_NV: Tensor) -> Tensor:
    """-sum_v p(v) log p(v), (N,), in nats."""
    return -(logps_NV.exp() * logps_NV).sum(dim=-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward": forward_kl, "reverse": reverse_kl}
