"""Per-token divergences between teacher P and student Q: pure functions on tensors.

Inputs are log-probabilities (N, V), N positions; outputs are (N,), in nats. Gradients flow to the student only: callers
pass teacher log-probabilities that need none. Equations and names follow arXiv 2601.19897, section 3 and appendix.

Three choices make a token's loss (`token_divergence`):

    divergence   forward KL(P || Q), reverse KL(Q || P), jsd                       over
    estimator    full: the whole vocabulary; top_k: its likeliest entries and one tail; sampled: the sampled token alone
    clips        of every vocabulary entry's share, of every token's sum
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLoss:
    """What is minimised at a position. `jsd_beta` counts for jsd only, `top_k` for the estimator of that name."""

    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    jsd_beta: float = 0.5
    estimator: Literal["full", "top_k", "sampled"] = "full"
    top_k: int = 128
    entry_clip: float | None = None
    token_clip: float | None = None

    def __post_init__(self) -> None:
        if self.estimator == "sampled" and (self.divergence != "reverse" or self.entry_clip is not None):
            raise ValueError("the sampled token alone estimates the reverse divergence only, and has no entries to clip")
        if self.divergence not in ("forward", "reverse", "jsd") or self.estimator not in ("full", "top_k", "sampled"):
            raise ValueError(f"there is no divergence {self.divergence!r} with the estimator {self.estimator!r}")
        if not 0 < self.jsd_beta < 1 or self.top_k < 1:
            raise ValueError("jsd_beta must be between 0 and 1, and top_k at least 1")
        if any(clip is not None and not clip > 0 for clip in (self.entry_clip, self.token_clip)):
            raise ValueError("clips must be above 0")


def token_divergence(loss: TokenLoss, teacher_logps_NV: Tensor, student_logps_NV: Tensor, sampled_ids_N: Tensor) -> Tensor:
    """A token's loss (N,), in nats, by the chosen divergence, estimator and clips. `sampled_ids_N`: the rollout's tokens.

    `token_clip` bounds a token's loss; a token beyond it gives no gradient.
    """
    if loss.estimator == "sampled":
        divergence_N = sampled_reverse_kl(teacher_logps_NV, student_logps_NV, sampled_ids_N)
    else:
        if loss.estimator == "top_k":
            chooser_NV = top_k_chooser(loss, teacher_logps_NV, student_logps_NV)
            teacher_logps_NV, student_logps_NV = top_k_and_tail(teacher_logps_NV, student_logps_NV, chooser_NV, loss.top_k)
        if loss.entry_clip is not None:
            divergence_N = clipped_divergence(loss.divergence, teacher_logps_NV, student_logps_NV, loss.entry_clip, loss.jsd_beta)
        elif loss.divergence == "jsd":
            divergence_N = jsd(teacher_logps_NV, student_logps_NV, loss.jsd_beta)
        else:
            divergence_N = DIVERGENCES[loss.divergence](teacher_logps_NV, student_logps_NV)
    return divergence_N if loss.token_clip is None else divergence_N.clamp(max=loss.token_clip)


def forward_kl(teacher_logps_NV: Tensor, student_logps_NV: Tensor) -> Tensor:
    """KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)). What the paper's released code minimises (its `alpha = 0`)."""
    return (teacher_logps_NV.exp() * (teacher_logps_NV - student_logps_NV)).sum(dim=-1)


def reverse_kl(teacher_logps_NV: Tensor, student_logps_NV: Tensor) -> Tensor:
    """KL(Q || P) = sum_v Q(v) (log Q(v) - log P(v)). The objective of the paper's first version.

    The gradient of the sequence's divergence equals on-policy reinforcement learning with the reward
    log pi(y | x, c) - log pi(y | x); this per-token form on fixed rollouts drops its return-to-go term.
    """
    return (student_logps_NV.exp() * (student_logps_NV - teacher_logps_NV)).sum(dim=-1)


def jsd(teacher_logps_NV: Tensor, student_logps_NV: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence (Agarwal et al., arXiv 2306.13649): beta KL(P || M) + (1 - beta) KL(Q || M), with
    M = beta P + (1 - beta) Q and 0 <= beta <= 1.

    It tends to 0 at both ends, where JSD / beta -> KL(P || Q) and JSD / (1 - beta) -> KL(Q || P); at 0 and at 1 those two
    are what it returns.
    """
    if beta == 0:
        return forward_kl(teacher_logps_NV, student_logps_NV)
    if beta == 1:
        return reverse_kl(teacher_logps_NV, student_logps_NV)
    mixture_NV = _mixture(teacher_logps_NV, student_logps_NV, beta)
    return beta * forward_kl(teacher_logps_NV, mixture_NV) + (1 - beta) * forward_kl(student_logps_NV, mixture_NV)


def sampled_reverse_kl(teacher_logps_NV: Tensor, student_logps_NV: Tensor, sampled_ids_N: Tensor) -> Tensor:
    """log Q(y) - log P(y) of the token y that the student sampled: unbiased for KL(Q || P), with the policy gradient
    (log Q(y) - log P(y)) d log Q(y) of its expectation (the score function's own mean is zero). Noisy, and may be negative.
    """
    own_N = student_logps_NV.gather(1, sampled_ids_N[:, None])[:, 0]
    shown_N = teacher_logps_NV.gather(1, sampled_ids_N[:, None])[:, 0]
    cost_N = (own_N - shown_N).detach()
    return cost_N + cost_N * (own_N - own_N.detach())


def top_k_chooser(loss: TokenLoss, teacher_logps_NV: Tensor, student_logps_NV: Tensor) -> Tensor:
    """Whose likeliest entries the estimator `top_k` keeps: of the distribution that weights the divergence's terms."""
    return student_logps_NV if loss.divergence == "reverse" else teacher_logps_NV


def top_k_mass(chooser_logps_NV: Tensor, k: int) -> Tensor:
    """Probability (N,) of the k likeliest entries: what the estimator `top_k` does not put into its tail."""
    return chooser_logps_NV.topk(min(k, chooser_logps_NV.shape[-1]), dim=-1).values.exp().sum(dim=-1)


def top_k_and_tail(teacher_logps_NV: Tensor, student_logps_NV: Tensor, chooser_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both distributions over the chooser's k likeliest entries and one tail that holds the rest's mass: (N, k + 1) each.

    Still distributions, so every divergence of them is non-negative, and never more than over the whole vocabulary (data
    processing inequality). Without the tail a forward KL goes negative and a reverse one has no lower bound. For `k` of V or
    more the distributions come back as they are.
    """
    if k >= chooser_NV.shape[-1]:
        return teacher_logps_NV, student_logps_NV
    index_Nk = chooser_NV.detach().topk(k, dim=-1).indices
    return _with_tail(teacher_logps_NV, index_Nk), _with_tail(student_logps_NV, index_Nk)


def clipped_divergence(divergence: str, teacher_logps_NV: Tensor, student_logps_NV: Tensor, entry_clip: float, jsd_beta: float = 0.5) -> Tensor:
    """A divergence each of whose vocabulary entries counts at most `entry_clip` nats; an entry beyond gives no gradient.

    Entries are taken in the form that is never negative (x log(x/y) - x + y; its extra terms add up to zero over the
    vocabulary), so that the sum stays a divergence, and so that a clipped entry, whose probability the others' gradient must
    come from, is not pushed away from the teacher: with the plain terms it would be.
    """
    teacher_NV, student_NV = teacher_logps_NV.exp(), student_logps_NV.exp()
    if divergence == "forward":
        entries_NV = _entry(teacher_NV, teacher_logps_NV, student_NV, student_logps_NV)
    elif divergence == "reverse":
        entries_NV = _entry(student_NV, student_logps_NV, teacher_NV, teacher_logps_NV)
    elif divergence != "jsd":
        raise ValueError(f"there is no divergence {divergence!r}")
    else:
        mixture_logps_NV = _mixture(teacher_logps_NV, student_logps_NV, jsd_beta)
        mixture_NV = mixture_logps_NV.exp()
        of_teacher_NV = _entry(teacher_NV, teacher_logps_NV, mixture_NV, mixture_logps_NV)
        of_student_NV = _entry(student_NV, student_logps_NV, mixture_NV, mixture_logps_NV)
        entries_NV = jsd_beta * of_teacher_NV + (1 - jsd_beta) * of_student_NV
    return entries_NV.clamp(max=entry_clip).sum(dim=-1)


def entropy(logps_NV: Tensor) -> Tensor:
    """-sum_v p(v) log p(v), (N,), in nats."""
    return -(logps_NV.exp() * logps_NV).sum(dim=-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward": forward_kl, "reverse": reverse_kl}


def _mixture(teacher_logps_NV: Tensor, student_logps_NV: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(teacher_logps_NV + math.log(beta), student_logps_NV + math.log1p(-beta))


def _entry(x_NV: Tensor, log_x_NV: Tensor, y_NV: Tensor, log_y_NV: Tensor) -> Tensor:
    return x_NV * (log_x_NV - log_y_NV) - x_NV + y_NV


def _with_tail(logps_NV: Tensor, index_Nk: Tensor) -> Tensor:
    tail_N1 = logps_NV.scatter(1, index_Nk, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logps_NV.gather(1, index_Nk), tail_N1], dim=-1)
