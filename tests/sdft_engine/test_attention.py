"""sdft_engine.attention against torch's own attention and, differentiated by hand, against finite differences."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention

from sdft_engine import attention
from sdft_engine.attention import causal_attention, causal_attention_is_faster

SHAPES = pytest.mark.parametrize(
    ("heads", "key_heads", "new", "past"), [(6, 2, 7, 0), (6, 2, 7, 3), (4, 4, 5, 0), (3, 1, 4, 6), (2, 2, 1, 4)], ids=lambda value: str(value)
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three queries of a head at a time, so that most lengths end in a smaller block."""
    monkeypatch.setattr(attention, "BLOCK", 3)


def states(heads: int, key_heads: int, new: int, past: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """As a decoder has them: heads next to each other in memory, seen through a transposition."""
    generator = torch.Generator().manual_seed(heads + new + past)

    def noise(count: int, length: int) -> Tensor:
        return torch.randn(2, length, count, 8, generator=generator, dtype=dtype).transpose(1, 2)

    return noise(heads, new), noise(key_heads, past + new), noise(key_heads, past + new)


def expected_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new, keys = q.shape[2], k.shape[2]
    allowed = torch.ones(new, keys, dtype=torch.bool).tril(keys - new)
    groups = q.shape[1] // k.shape[1]
    out = scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), attn_mask=allowed)
    return out.transpose(1, 2).flatten(2)


@SHAPES
def test_values(heads: int, key_heads: int, new: int, past: int) -> None:
    q, k, v = states(heads, key_heads, new, past)
    torch.testing.assert_close(causal_attention(q, k, v), expected_of(q, k, v))


@SHAPES
def test_gradients(heads: int, key_heads: int, new: int, past: int) -> None:
    inputs = [each.detach().requires_grad_() for each in states(heads, key_heads, new, past)]
    assert gradcheck(causal_attention, inputs)
    weights = torch.randn(expected_of(*inputs).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((causal_attention(*inputs) * weights).sum(), inputs)
    for actual, wanted in zip(found, torch.autograd.grad((expected_of(*inputs) * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_in_float32_with_its_own_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that end in the middle of a block of 256, by whichever product is the fastest here."""
    monkeypatch.undo()
    inputs = [each.detach().requires_grad_() for each in states(6, 2, 300, 20, torch.float32)]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    out, wanted = causal_attention(*inputs), expected_of(*exact)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-6)
    for actual, value in zip(torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(wanted.square().sum(), exact), strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=0, atol=5e-5 * float(value.abs().max()))


def test_only_long_rows_of_float32_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(attention, "onednn_is_faster", lambda: True)
    assert causal_attention_is_faster(torch.empty(2, attention.LONG, 8))
    assert not causal_attention_is_faster(torch.empty(300, attention.LONG - 1, 8))
    assert not causal_attention_is_faster(torch.empty(2, 999, 8, dtype=torch.bfloat16))
    monkeypatch.setattr(attention, "onednn_is_faster", lambda: False)
    assert not causal_attention_is_faster(torch.empty(2, 999, 8))
