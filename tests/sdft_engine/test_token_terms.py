"""sdft_engine.token_terms: differentiated by hand or by torch, it is the loss and the metrics of divergences.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_engine import token_terms as module
from sdft_engine.divergences import TokenLoss, entropy, token_divergence, top_k_mass
from sdft_engine.token_terms import TokenTerms, token_terms

POSITIONS, VOCABULARY = 9, 40
LOSSES = [
    TokenLoss("forward"),
    TokenLoss("reverse"),
    TokenLoss("forward", token_clip=0.9),
    TokenLoss("reverse", token_clip=0.9),
    TokenLoss("jsd", jsd_beta=0.3),
    TokenLoss("forward", entry_clip=0.05),
    TokenLoss("forward", estimator="top_k", top_k=5),
    TokenLoss("reverse", estimator="top_k", top_k=5),
    TokenLoss("reverse", estimator="sampled"),
]
BY_HAND = LOSSES[:4]


def logits(seed: int, spread: float = 2.0) -> Tensor:
    return torch.randn(POSITIONS, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread + 17.0


TEACHER, STUDENT = logits(1), logits(2)
STUDENT[4] = TEACHER[4]
STUDENT[7] = TEACHER[7] + logits(5, 0.2)[7]  # below the clip of a token
IDS = torch.randint(VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.rand(POSITIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
WEIGHTS[6] = 0.0


@pytest.fixture(params=["together", "in_blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also with two rows worked on at a time, the last block holding one."""
    if request.param == "in_blocks":
        monkeypatch.setattr(module, "CACHED_ELEMENTS", 2 * VOCABULARY + 5)
    return str(request.param)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_loss_gradient_and_metrics(loss: TokenLoss, temperature: float, blocks: str) -> None:
    expected_z = STUDENT.clone().requires_grad_()
    p, q = (TEACHER / temperature).log_softmax(dim=-1), (expected_z / temperature).log_softmax(dim=-1)
    divergences = token_divergence(loss, p, q, IDS)
    (divergences * WEIGHTS).sum().backward()
    own = q.detach()

    z = STUDENT.clone().requires_grad_()
    terms = token_terms(loss, TEACHER, z, IDS, WEIGHTS, temperature)
    (3 * terms.loss).backward()

    def close(actual: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)

    assert z.grad is not None
    assert expected_z.grad is not None
    assert float(expected_z.grad.abs().max()) > 1e-3
    close(z.grad, 3 * expected_z.grad)
    close(terms.loss.detach(), (divergences.detach() * WEIGHTS).sum())
    close(terms.divergence, divergences.detach())
    close(terms.entropy, entropy(own))
    assert terms.agrees.tolist() == (own.argmax(dim=-1) == p.argmax(dim=-1)).tolist()
    assert 0 < int(terms.agrees.sum()) < POSITIONS
    rows = torch.arange(POSITIONS)
    close(terms.reward, p[rows, IDS] - own[rows, IDS])
    if loss.estimator == "top_k":
        assert terms.kept_mass is not None
        close(terms.kept_mass, top_k_mass(own if loss.divergence == "reverse" else p, 5))
    else:
        assert terms.kept_mass is None


@pytest.mark.parametrize("loss", BY_HAND, ids=str)
def test_logits_stay_as_they_are_and_only_the_student_gets_a_gradient(loss: TokenLoss) -> None:
    teacher, student = TEACHER.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    terms = token_terms(loss, teacher, student, IDS, WEIGHTS)
    terms.loss.backward()
    assert torch.equal(teacher, TEACHER)
    assert torch.equal(student, STUDENT)
    assert teacher.grad is None
    assert not any(value.requires_grad for value in (terms.divergence, terms.entropy, terms.agrees, terms.reward))


@pytest.mark.parametrize("loss", BY_HAND, ids=str)
def test_gradcheck(loss: TokenLoss) -> None:
    assert torch.autograd.gradcheck(lambda z: token_terms(loss, TEACHER, z, IDS, WEIGHTS, 0.7).loss, (STUDENT.clone().requires_grad_(),))


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_in_float32_as_close_to_float64_as_the_functions_of_log_probabilities(kind: Any) -> None:
    """Near agreement, where differences of large logits decide: errors of both stay within a few roundings of the logits."""
    generator = torch.Generator().manual_seed(5)
    teacher = torch.randn(200, 2000, dtype=torch.float64, generator=generator) * 4 + 20
    student = teacher + torch.randn(teacher.shape, dtype=torch.float64, generator=generator) * 0.05
    ids, weights = torch.zeros(200, dtype=torch.long), torch.ones(200)
    teacher, student = teacher.float().double(), student.float().double()
    exact = token_divergence(TokenLoss(kind), teacher.log_softmax(dim=-1), student.log_softmax(dim=-1), ids)
    terms = token_terms(TokenLoss(kind), teacher.float(), student.float(), ids, weights)
    plain = token_divergence(TokenLoss(kind), teacher.float().log_softmax(dim=-1), student.float().log_softmax(dim=-1), ids)
    error, plain_error = (float((values.double() - exact).abs().max()) for values in (terms.divergence, plain))
    assert error < 1.5e-6
    assert error < 1.5 * plain_error


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_certain_distributions_give_finite_values_and_gradients(kind: Any) -> None:
    """Logits thousands apart: probabilities underflow to zero, nothing becomes NaN."""
    teacher = torch.tensor([[9000.0, 0.0, -9000.0], [0.0, 0.0, 9000.0]])
    z = torch.tensor([[0.0, 9000.0, -9000.0], [0.0, 0.0, 9000.0]]).requires_grad_()
    terms = token_terms(TokenLoss(kind), teacher, z, torch.tensor([0, 2]), torch.ones(2))
    terms.loss.backward()
    assert terms.divergence.tolist() == [9000.0, 0.0]
    assert terms.entropy.tolist() == [0.0, 0.0]
    assert terms.reward.tolist() == [9000.0, 0.0]
    assert terms.agrees.tolist() == [False, True]
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_no_positions_are_no_loss() -> None:
    z = torch.empty(0, VOCABULARY).requires_grad_()
    terms: TokenTerms = token_terms(TokenLoss(), torch.empty(0, VOCABULARY), z, torch.empty(0, dtype=torch.long), torch.empty(0))
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert math.isfinite(terms.loss.item())
