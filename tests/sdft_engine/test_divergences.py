"""sdft_engine.divergences against values worked out by hand, loops in float64, and their calculus."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_engine.divergences import (
    DIVERGENCES,
    TokenLoss,
    clipped_divergence,
    entropy,
    forward_kl,
    jsd,
    reverse_kl,
    sampled_reverse_kl,
    token_divergence,
    top_k_and_tail,
)

LN2, LN3 = math.log(2), math.log(3)
BOTH = pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
BETAS = (0.1, 0.5, 0.9)
KINDS = pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])


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


def test_jsd_by_hand() -> None:
    teacher, student = logps([1 / 2, 1 / 2]), logps([1, 1e-300])
    # M = (3/4, 1/4): 1/2 (1/2 ln 2/3 + 1/2 ln 2) + 1/2 ln 4/3
    expected = 0.25 * math.log(2 / 3) + 0.25 * LN2 + 0.5 * math.log(4 / 3)
    assert jsd(teacher, student, 0.5).tolist() == pytest.approx([expected], abs=1e-12)
    # beta = 1/4, M = 1/4 P + 3/4 Q = (7/8, 1/8): 1/4 (1/2 ln 4/7 + 1/2 ln 4) + 3/4 ln 8/7
    expected = 0.125 * math.log(4 / 7) + 0.125 * math.log(4) + 0.75 * math.log(8 / 7)
    assert jsd(teacher, student, 0.25).tolist() == pytest.approx([expected], abs=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_against_loops(beta: float) -> None:
    teacher, student = random_logps(14), random_logps(15)
    expected = []
    for p_row, q_row in zip(teacher.exp().tolist(), student.exp().tolist(), strict=True):
        total = 0.0
        for p, q in zip(p_row, q_row, strict=True):
            m = beta * p + (1 - beta) * q
            total += beta * p * math.log(p / m) + (1 - beta) * q * math.log(q / m)
        expected.append(total)
    assert jsd(teacher, student, beta).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_of_the_jsd(beta: float) -> None:
    teacher, logits = random_logps(16), random_logps(17).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: jsd(teacher, z.log_softmax(dim=-1), beta), (logits,))


def test_the_jsd_tends_to_the_two_kls_at_its_ends() -> None:
    """JSD / beta -> KL(P || Q) for beta -> 0, JSD / (1 - beta) -> KL(Q || P) for beta -> 1, both linearly in the distance."""
    teacher, student = random_logps(18, spread=1.0), random_logps(19, spread=1.0)
    for small in (1e-3, 1e-5):
        torch.testing.assert_close(jsd(teacher, student, small) / small, forward_kl(teacher, student), rtol=20 * small, atol=1e-9)
        torch.testing.assert_close(jsd(teacher, student, 1 - small) / small, reverse_kl(teacher, student), rtol=20 * small, atol=1e-9)
    assert jsd(teacher, student, 1e-5).max() < 1e-4
    assert torch.equal(jsd(teacher, student, 0.0), forward_kl(teacher, student))
    assert torch.equal(jsd(teacher, student, 1.0), reverse_kl(teacher, student))


def test_the_jsd_is_symmetric_when_the_roles_and_the_weights_are_swapped() -> None:
    teacher, student = random_logps(20), random_logps(21)
    torch.testing.assert_close(jsd(teacher, student, 0.3), jsd(student, teacher, 0.7), rtol=1e-12, atol=0)


def test_top_k_and_tail_by_hand() -> None:
    teacher, student = logps([1 / 2, 1 / 4, 1 / 8, 1 / 8]), logps([1 / 8, 1 / 8, 1 / 4, 1 / 2])
    shown, own = top_k_and_tail(teacher, student, teacher, 2)
    assert shown.exp().tolist() == [pytest.approx([1 / 2, 1 / 4, 1 / 4])]
    assert own.exp().tolist() == [pytest.approx([1 / 8, 1 / 8, 3 / 4])]
    shown, own = top_k_and_tail(teacher, student, student, 2)
    assert own.exp().tolist() == [pytest.approx([1 / 2, 1 / 4, 1 / 4])]
    assert shown.exp().tolist() == [pytest.approx([1 / 8, 1 / 8, 3 / 4])]


@KINDS
def test_top_k_is_a_divergence_that_grows_to_the_full_one(kind: Any) -> None:
    """Never negative (a truncated forward KL without its tail would be), never above the full one, equal to it from k = V on."""
    teacher, student = random_logps(22, 400, 40, 3.0), random_logps(23, 400, 40, 3.0)
    ids = torch.zeros(400, dtype=torch.long)
    full = token_divergence(TokenLoss(kind), teacher, student, ids)
    before = torch.zeros(400, dtype=torch.float64)
    for k in (1, 8, 39, 40, 1000):
        values = token_divergence(TokenLoss(kind, estimator="top_k", top_k=k), teacher, student, ids)
        assert values.min() >= 0
        assert (values >= before - 1e-12).all()
        assert (values <= full + 1e-12).all()
        before = values
    torch.testing.assert_close(before, full, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "whose"), [("forward", "teacher"), ("reverse", "student"), ("jsd", "teacher")])
def test_whose_top_k_is_taken(kind: Any, whose: str) -> None:
    teacher, student = logps([0.7, 0.1, 0.1, 0.1]), logps([0.1, 0.2, 0.1, 0.6])
    kept = {"teacher": ([0.7, 0.3], [0.1, 0.9]), "student": ([0.1, 0.9], [0.6, 0.4])}[whose]
    expected = token_divergence(TokenLoss(kind), logps(kept[0]), logps(kept[1]), torch.tensor([0]))
    actual = token_divergence(TokenLoss(kind, estimator="top_k", top_k=1), teacher, student, torch.tensor([0]))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@KINDS
def test_gradient_of_top_k(kind: Any) -> None:
    teacher, logits, ids = random_logps(24), random_logps(25).requires_grad_(), torch.zeros(5, dtype=torch.long)
    loss = TokenLoss(kind, estimator="top_k", top_k=3)
    assert torch.autograd.gradcheck(lambda z: token_divergence(loss, teacher, z.log_softmax(dim=-1), ids), (logits,))


def test_the_sampled_estimator_is_unbiased_in_value_and_gradient() -> None:
    """Its mean over the student's own distribution, entry by entry, is the reverse KL and the reverse KL's gradient."""
    teacher, logits = random_logps(26, positions=1), random_logps(27, positions=1).requires_grad_()
    student = logits.log_softmax(dim=-1)
    exact = reverse_kl(teacher, student)
    (expected,) = torch.autograd.grad(exact.sum(), logits, retain_graph=True)
    value, gradient = torch.zeros(1, dtype=torch.float64), torch.zeros_like(logits)
    for token in range(7):
        estimate = sampled_reverse_kl(teacher, student, torch.tensor([token]))
        (one,) = torch.autograd.grad(estimate.sum(), logits, retain_graph=True)
        probability = student.detach()[0, token].exp()
        value += probability * estimate.detach()
        gradient += probability * one
        assert estimate.item() == pytest.approx((student - teacher)[0, token].item(), abs=1e-12)
    torch.testing.assert_close(value, exact.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


@KINDS
def test_a_clip_that_nothing_reaches_changes_nothing(kind: Any) -> None:
    teacher, logits, ids = random_logps(28), random_logps(29).requires_grad_(), torch.zeros(5, dtype=torch.long)
    gradients = []
    for loss in (TokenLoss(kind), TokenLoss(kind, entry_clip=1e6, token_clip=1e6)):
        values = token_divergence(loss, teacher, logits.log_softmax(dim=-1), ids)
        gradients.append((values.detach(), torch.autograd.grad(values.sum(), logits)[0]))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=0, atol=1e-12)


def test_the_clip_of_an_entry_by_hand() -> None:
    """Forward entries P ln(P/Q) - P + Q: 1/2 ln 4 - 3/8 = 0.318, 1/4 ln(1/3) + 1/2 = 0.225, 1/4 ln 2 - 1/8 = 0.048."""
    teacher, student = logps([1 / 2, 1 / 4, 1 / 4]), logps([1 / 8, 3 / 4, 1 / 8])
    second, third = 0.5 - 0.25 * LN3, 0.25 * LN2 - 0.125
    assert clipped_divergence("forward", teacher, student, 0.3).tolist() == pytest.approx([0.3 + second + third], abs=1e-12)
    assert clipped_divergence("forward", teacher, student, 0.1).tolist() == pytest.approx([0.2 + third], abs=1e-12)
    # reverse entries Q ln(Q/P) - Q + P: 1/8 ln(1/4) + 3/8 = 0.202, 3/4 ln 3 - 1/2 = 0.324, 1/8 ln(1/2) + 1/8 = 0.038
    rest = 0.375 - 0.25 * LN2 + 0.125 - 0.125 * LN2
    assert clipped_divergence("reverse", teacher, student, 0.3).tolist() == pytest.approx([0.3 + rest], abs=1e-12)


@KINDS
@pytest.mark.parametrize("clip", [0.02, 0.2])
def test_clipped_entries_stay_a_divergence(kind: Any, clip: float) -> None:
    teacher, student = random_logps(30, 500, 30), random_logps(31, 500, 30)
    values = clipped_divergence(kind, teacher, student, clip)
    assert values.min() >= 0
    assert values.max() <= 30 * clip
    assert (values <= token_divergence(TokenLoss(kind), teacher, student, torch.zeros(500, dtype=torch.long)) + 1e-12).all()
    assert clipped_divergence(kind, teacher, teacher, clip).abs().max() < 1e-12


def test_a_clipped_entry_is_not_pushed_away_from_its_teacher() -> None:
    """The teacher's one likely token is beyond the clip. Its own entry gives no gradient; the others' raises it, as it should."""
    teacher = logps([0.9, 0.05, 0.05])
    logits = torch.tensor([[0.05, 0.9, 0.05]], dtype=torch.float64).log().requires_grad_()
    clipped_divergence("forward", teacher, logits.log_softmax(dim=-1), 1.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] < 0
    assert logits.grad[0, 1] > 0


@KINDS
def test_the_clip_of_a_token(kind: Any) -> None:
    teacher = logps([0.98, 0.01, 0.01], [0.4, 0.3, 0.3])
    logits = logps([0.01, 0.98, 0.01], [0.3, 0.4, 0.3]).requires_grad_()
    loss, ids = TokenLoss(kind, token_clip=0.1), torch.tensor([0, 0])
    values = token_divergence(loss, teacher, logits.log_softmax(dim=-1), ids)
    values.sum().backward()
    assert values[0].item() == 0.1
    assert 0 < values[1].item() < 0.1
    assert logits.grad is not None
    assert logits.grad[0].abs().max() == 0
    assert logits.grad[1].abs().max() > 0


@KINDS
@pytest.mark.parametrize("estimator", ["full", "top_k"])
@pytest.mark.parametrize("entry_clip", [None, 0.05])
def test_every_choice_is_finite_for_certain_distributions(kind: Any, estimator: Any, entry_clip: float | None) -> None:
    teacher = torch.tensor([[9000.0, 0.0, -9000.0], [0.0, 0.0, 9000.0]]).log_softmax(dim=-1)
    logits = torch.tensor([[0.0, 9000.0, -9000.0], [0.0, 0.0, 9000.0]]).requires_grad_()
    loss = TokenLoss(kind, estimator=estimator, top_k=1, entry_clip=entry_clip)
    values = token_divergence(loss, teacher, logits.log_softmax(dim=-1), torch.tensor([0, 0]))
    values.sum().backward()
    assert values.isfinite().all()
    assert values[0] > 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_sampled_token_alone_is_no_estimate_of_another_divergence() -> None:
    for options in ({"divergence": "forward"}, {"divergence": "jsd"}, {"divergence": "reverse", "entry_clip": 0.1}):
        with pytest.raises(ValueError, match="estimates the reverse divergence only"):
            TokenLoss(estimator="sampled", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"divergence": "kl"}, {"estimator": "half"}, {"jsd_beta": 2.0}, {"jsd_beta": 0.0}, {"top_k": 0}, {"token_clip": -1.0}, {"entry_clip": 0.0}]
)
def test_a_loss_that_does_not_exist_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"divergence|between 0 and 1|above 0"):
        TokenLoss(**options)
