"""sdft_engine.divergences against values worked out by hand, loops in float64, and their calculus."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdft_engine.divergences import DIVERGENCES, entropy, forward_kl, reverse_kl

LN2, LN3 = math.log(2), math.log(3)
BOTH = pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])


def logps(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def random_logps(seed: int, positions: int = 5, vocabulary: int = 7, spread: float = 2.0) -> Tensor:
    logits = torch.randn(positions, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread
    return logits.log_softmax(dim=-1)


def test_forward_kl_by_hand() -> None:
    teacher = logps([1 / 2, 1 / 4, 1 / 4], [1 / 4, 5 / 8, 1 / 8])
    student = logps([1 / 8, 3 / 4, 1 / 8], [1 / 4, 5 / 8, 1 / 8])
    # 1/2 ln 4 + 1/4 ln 1/3 + 1/4 ln 2
    assert forward_kl(teacher, student).tolist() == pytest.approx([1.25 * LN2 - 0.25 * LN3, 0.0], abs=1e-12)


def test_reverse_kl_by_hand() -> None:
    teacher, student = logps([1 / 2, 1 / 4, 1 / 4]), logps([1 / 8, 3 / 4, 1 / 8])
    # 1/8 ln 1/4 + 3/4 ln 3 + 1/8 ln 1/2
    assert reverse_kl(teacher, student).tolist() == pytest.approx([0.75 * LN3 - 0.375 * LN2], abs=1e-12)


def test_entropy_by_hand() -> None:
    assert entropy(logps([1 / 4] * 4, [1 / 2, 1 / 4, 1 / 8, 1 / 8])).tolist() == pytest.approx([2 * LN2, 1.75 * LN2], abs=1e-12)


def test_the_names_of_the_hyperparameter_mean_these_functions() -> None:
    assert list(DIVERGENCES.items()) == [("forward", forward_kl), ("reverse", reverse_kl)]


@BOTH
def test_against_loops(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
    teacher, student = random_logps(1), random_logps(2)
    expected = []
    for p_row, q_row in zip(teacher.tolist(), student.tolist(), strict=True):
        pairs = zip(p_row, q_row, strict=True)
        if divergence is forward_kl:
            expected.append(sum(math.exp(p) * (p - q) for p, q in pairs))
        else:
            expected.append(sum(math.exp(q) * (q - p) for p, q in pairs))
    assert divergence(teacher, student).tolist() == pytest.approx(expected, rel=1e-12)


@BOTH
def test_gradcheck(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
    teacher = random_logps(3)
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(teacher, z.log_softmax(dim=-1)), (logits,))


def test_gradient_of_the_forward_kl_in_the_logits_is_student_minus_teacher() -> None:
    teacher = random_logps(5)
    logits = random_logps(6).requires_grad_()
    forward_kl(teacher, logits.log_softmax(dim=-1)).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(dim=-1) - teacher.exp(), rtol=0, atol=1e-12)


def test_gradient_of_the_reverse_kl_in_the_logits() -> None:
    """d/dz_v = Q(v) (log Q(v) - log P(v) - KL(Q || P))."""
    teacher = random_logps(7)
    logits = random_logps(8).requires_grad_()
    student = logits.log_softmax(dim=-1)
    values = reverse_kl(teacher, student)
    values.sum().backward()
    expected = student.exp() * (student - teacher - values[:, None])
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=0, atol=1e-12)


@BOTH
def test_gradient_flows_to_the_student_only(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
    teacher, student = random_logps(9), random_logps(10).requires_grad_()
    divergence(teacher, student).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().min() > 0


@BOTH
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_never_negative(divergence: Callable[[Tensor, Tensor], Tensor], spread: float) -> None:
    values = divergence(random_logps(11, 2000, 50, spread), random_logps(12, 2000, 50, spread))
    assert values.min() >= 0
    assert values.max() > 0


@BOTH
def test_zero_exactly_where_the_distributions_are_equal(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
    teacher = random_logps(13, positions=2)
    student = teacher.clone()
    student[1, 3] += 1e-3
    values = divergence(teacher, student.log_softmax(dim=-1))
    assert values[0] == pytest.approx(0, abs=1e-15)
    assert values[1] > 1e-9


@BOTH
def test_certain_distributions_give_finite_values_and_gradients(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Logits thousands apart, as of a trained model in float32: probabilities underflow to zero, nothing becomes NaN."""
    teacher = torch.tensor([[9000.0, 0.0, -9000.0], [0.0, 0.0, 9000.0]]).log_softmax(dim=-1)
    logits = torch.tensor([[0.0, 9000.0, -9000.0], [0.0, 0.0, 9000.0]]).requires_grad_()
    values = divergence(teacher, logits.log_softmax(dim=-1))
    values.sum().backward()
    assert values.tolist() == [9000.0, 0.0]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
