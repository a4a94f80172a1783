"""sdft_engine.importance against values worked out by hand."""

import math

import pytest
import torch

from sdft_engine.importance import importance_weights

LN2, LN4 = math.log(2), math.log(4)
MASK = torch.tensor([False, True, True, True])
TRAINER = torch.tensor([-1.0, -2.0, -3.0, -1.0])
SAMPLER = torch.tensor([-1.0 - LN2, -2.0 + LN2, -3.0 - LN4, -1.0])  # ratios 2, 1/2, 4, 1


def test_sequence_by_hand() -> None:
    weights, ratios = importance_weights(TRAINER, SAMPLER, MASK, "sequence")
    assert ratios.tolist() == pytest.approx([2, 0.5, 4, 1])
    assert weights.tolist() == pytest.approx([(0.5 + 2 + 1) / 3] * 4)  # the masked token does not count; 4 is capped at 2


def test_prefix_by_hand() -> None:
    weights, _ = importance_weights(TRAINER, SAMPLER, MASK, "prefix")
    assert weights.tolist() == pytest.approx([1, 2, 1, 2])  # products before: 1, 2, 1, 4 -> 2


@pytest.mark.parametrize("correction", ["sequence", "prefix"])
def test_the_trainers_own_rollouts_weigh_one(correction: str) -> None:
    weights, ratios = importance_weights(TRAINER, TRAINER.clone(), MASK, correction)  # type: ignore[arg-type]
    assert weights.tolist() == ratios.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("correction", ["sequence", "prefix"])
def test_a_rollout_without_loss_tokens_weighs_one_and_is_no_nan(correction: str) -> None:
    weights, _ = importance_weights(TRAINER, SAMPLER, torch.zeros(4, dtype=torch.bool), correction)  # type: ignore[arg-type]
    assert weights.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("correction", ["sequence", "prefix"])
def test_no_gradient_flows_through_the_weights(correction: str) -> None:
    trainer = TRAINER.clone().requires_grad_()
    weights, ratios = importance_weights(trainer, SAMPLER, MASK, correction)  # type: ignore[arg-type]
    assert not weights.requires_grad
    assert not ratios.requires_grad


def test_the_prefix_weight_makes_the_mean_over_another_sampler_exact() -> None:
    """Two tokens of a vocabulary of two, all four rollouts enumerated: the sampler's mean of weight times value is the
    trainer's mean of the value, where the value at a position depends on the tokens before it."""
    first = {"trainer": torch.tensor([0.7, 0.3]), "sampler": torch.tensor([0.5, 0.5])}
    second = {"trainer": torch.tensor([[0.2, 0.8], [0.6, 0.4]]), "sampler": torch.tensor([[0.5, 0.5], [0.4, 0.6]])}
    value = torch.tensor([1.0, 5.0])  # of position 1, by the token at position 0
    exact = float((first["trainer"] * value).sum())
    estimate = 0.0
    for a in range(2):
        for b in range(2):
            logps = {who: torch.stack([first[who][a], second[who][a, b]]).log() for who in first}
            weights, _ = importance_weights(logps["trainer"], logps["sampler"], torch.tensor([True, True]), "prefix")
            estimate += float(first["sampler"][a] * second["sampler"][a, b] * weights[1] * value[a])
    assert estimate == pytest.approx(exact)
