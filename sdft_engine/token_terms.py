"""What a step needs to know of every token, from teacher's and student's logits: its loss with the gradient, and its metrics.

The two divergences over the whole vocabulary that are trained with most, forward and reverse, are differentiated by hand while
their logits are in the processor's cache, a few rows at a time: each logit is read from memory once instead of some twenty
times, and nothing of the vocabulary's width is kept but the gradient. With z the logits divided by the temperature, P = softmax
of the teacher's, Q of the student's, d = z_teacher - z_student and c = log sum exp z_teacher - log sum exp z_student:

    KL(P || Q) = sum_v P(v) d(v) - c                   d/dz_student = Q - P
    KL(Q || P) = c - sum_v Q(v) d(v)                   d/dz_student = Q (c - d - KL(Q || P))

log sum exp z is max z - log max softmax(z): both maxima are cheap, and where they are large their differences are still exact.
Everything else goes through the functions of divergences.py and torch's own differentiation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sdft_engine.divergences import TokenLoss, entropy, token_divergence, top_k_chooser, top_k_mass

CACHED_ELEMENTS = 1 << 20
"""Logits worked on at a time on a CPU: 4 MiB, of which some four arrays are alive."""


@dataclass(frozen=True)
class TokenTerms:
    """Of N positions, (N,) each and without gradients, but for `loss`.

    loss        the weighted sum of the divergences, differentiable in the student's logits
    divergence  of the chosen kind, in nats, clipped where a clip is set
    entropy     of the student, in nats
    agrees      whether the teacher's likeliest token is one of the student's likeliest
    reward      log P(y) - log Q(y) of the sampled token y
    kept_mass   probability of the entries that the estimator `top_k` keeps; None: another estimator
    """

    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    agrees: Tensor
    reward: Tensor
    kept_mass: Tensor | None = None


def token_terms(
    loss: TokenLoss, teacher_logits_NV: Tensor, student_logits_NV: Tensor, sampled_ids_N: Tensor, weights_N: Tensor, temperature: float = 1.0
) -> TokenTerms:
    """`weights_N`: how much each token's divergence counts in the loss. Both logits are divided by `temperature` first."""
    if loss.estimator == "full" and loss.entry_clip is None and loss.divergence != "jsd":
        return TokenTerms(*_FullDivergence.apply(student_logits_NV, teacher_logits_NV, sampled_ids_N, weights_N, loss, temperature))  # type: ignore[no-untyped-call]
    teacher_logps_NV = (teacher_logits_NV.detach() / temperature).log_softmax(dim=-1)
    student_logps_NV = (student_logits_NV / temperature).log_softmax(dim=-1)
    divergence_N = token_divergence(loss, teacher_logps_NV, student_logps_NV, sampled_ids_N)
    own_NV = student_logps_NV.detach()
    chooser_NV = top_k_chooser(loss, teacher_logps_NV, own_NV)
    return TokenTerms(
        loss=(divergence_N * weights_N).sum(),
        divergence=divergence_N.detach(),
        entropy=entropy(own_NV),
        agrees=_chosen(own_NV, teacher_logps_NV.argmax(dim=-1)) == own_NV.amax(dim=-1),
        reward=_chosen(teacher_logps_NV, sampled_ids_N) - _chosen(own_NV, sampled_ids_N),
        kept_mass=top_k_mass(chooser_NV, loss.top_k) if loss.estimator == "top_k" else None,
    )


class _FullDivergence(Function):
    """Forward or reverse divergence over the whole vocabulary; the gradient is made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, student_logits_NV: Tensor, teacher_logits_NV: Tensor, sampled_ids_N: Tensor, weights_N: Tensor, loss: TokenLoss, temperature: float
    ) -> tuple[Tensor, ...]:
        count, vocabulary = student_logits_NV.shape
        gradient_NV = torch.empty_like(student_logits_NV)
        divergence_N, entropy_N, reward_N = student_logits_NV.new_empty(3, count)
        agrees_N = torch.empty_like(sampled_ids_N, dtype=torch.bool)
        size = max(1, CACHED_ELEMENTS // vocabulary) if student_logits_NV.device.type == "cpu" else max(1, count)
        for start in range(0, count, size):
            part = slice(start, start + size)
            teacher_BV, student_BV = teacher_logits_NV[part], student_logits_NV[part]
            if temperature != 1:
                teacher_BV, student_BV = teacher_BV / temperature, student_BV / temperature
            p_BV, q_BV = teacher_BV.softmax(dim=-1), torch.softmax(student_BV, dim=-1, out=gradient_NV[part])
            best_B, log_highest_B = student_BV.amax(dim=-1), q_BV.amax(dim=-1).log_()
            c_B = teacher_BV.amax(dim=-1) - best_B + (log_highest_B - p_BV.amax(dim=-1).log_())
            agrees_N[part] = _chosen(student_BV, teacher_BV.argmax(dim=-1)) == best_B
            entropy_N[part] = best_B - log_highest_B - torch.linalg.vecdot(q_BV, student_BV)
            difference_BV = teacher_BV - student_BV
            reward_N[part] = _chosen(difference_BV, sampled_ids_N[part]) - c_B
            if loss.divergence == "forward":
                kl_B = torch.linalg.vecdot(p_BV, difference_BV) - c_B
                q_BV.sub_(p_BV)
            else:
                kl_B = c_B - torch.linalg.vecdot(q_BV, difference_BV)
                q_BV.mul_(difference_BV.neg_().add_((c_B - kl_B)[:, None]))
            weight_B = weights_N[part] / temperature
            if loss.token_clip is not None:
                weight_B = torch.where(kl_B > loss.token_clip, 0.0, weight_B)
                kl_B = kl_B.clamp(max=loss.token_clip)
            q_BV.mul_(weight_B[:, None])
            divergence_N[part] = kl_B
        ctx.save_for_backward(gradient_NV)
        ctx.mark_non_differentiable(divergence_N, entropy_N, agrees_N, reward_N)
        return (divergence_N * weights_N).sum(), divergence_N, entropy_N, agrees_N, reward_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV if bool(gradients[0] == 1) else gradient_NV * gradients[0], None, None, None, None, None


def _chosen(values_NV: Tensor, ids_N: Tensor) -> Tensor:
    return values_NV.gather(1, ids_N[:, None])[:, 0]
