"""Weights for rollouts that another program sampled (vLLM), whose log-probabilities differ a little from the trainer's.

With r_t = pi_trainer(y_t | ...) / pi_sampler(y_t | ...), both at the sampling temperature:

`sequence`  one weight for the whole rollout, the mean of min(r_t, cap) over its loss tokens: the paper's released code.
`prefix`    token t's weight is min(prod_{s<t} r_s, cap). The divergence at t is analytic over the vocabulary, so its own
            ratio corrects nothing (its mean given the prefix is 1); what differs is how often the prefix comes up, and the
            product over the tokens before is the exact weight for that.

A server reports log-probabilities at temperature 1, whatever it samples at. At the temperature tau log r_t is taken as the
difference of those, divided by tau: with z and z + e the two programs' logits, that is (e_y - E[e]) / tau to the first order, where
the mean is over the distribution at 1 in place of the one at tau. Both are rounding errors' means, near zero.

Weights are constants: no gradient flows through them.
"""

from typing import Literal

from torch import Tensor

CAP = 2.0

ImportanceCorrection = Literal["sequence", "prefix"]


def importance_weights(
    trainer_logps_T: Tensor, sampler_logps_T: Tensor, loss_mask_T: Tensor, correction: ImportanceCorrection, cap: float = CAP
) -> tuple[Tensor, Tensor]:
    """Weights (T,) of a rollout's T tokens, and the ratios r (T,). Ones where no token of the rollout gives loss."""
    log_ratios_T = (trainer_logps_T - sampler_logps_T).detach()
    ratios_T = log_ratios_T.exp()
    if not bool(loss_mask_T.any()):
        return ratios_T.new_ones(ratios_T.shape), ratios_T
    if correction == "sequence":
        weight = ratios_T[loss_mask_T].clamp(max=cap).mean()
        return weight.expand(ratios_T.shape), ratios_T
    before_T = log_ratios_T.cumsum(dim=0) - log_ratios_T
    return before_T.exp().clamp(max=cap), ratios_T
