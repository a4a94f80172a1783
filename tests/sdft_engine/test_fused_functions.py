"""sdft_engine.fused_functions: values and gradients against autograd and finite differences, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import silu

from sdft_engine.fused_functions import FrozenLinear, lora_projections, scaled_rms_norm, swiglu

GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape: int, gradient: bool = True) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64, requires_grad=gradient)


def projections() -> tuple[list[FrozenLinear], list[Tensor]]:
    """Two layers of one input (4), of 6 and 3 outputs, ranks 2; the second with a bias."""
    layers = [FrozenLinear(noise(6, 4, gradient=False), None, 1.5), FrozenLinear(noise(3, 4, gradient=False), noise(3, gradient=False), 0.5)]
    return layers, [noise(2, 4), noise(6, 2), noise(2, 4), noise(3, 2)]


def test_projections_add_each_layers_own_correction() -> None:
    layers, factors = projections()
    x = noise(2, 5, 4)
    for layer, a, b, found in zip(layers, factors[0::2], factors[1::2], lora_projections(x, layers, factors), strict=True):
        expected = x @ layer.weight.T + layer.scaling * (x @ a.T @ b.T) + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("input_needs_gradient", [True, False])
def test_gradients_of_projections(input_needs_gradient: bool) -> None:
    layers, factors = projections()
    x = noise(2, 5, 4, gradient=input_needs_gradient)
    assert gradcheck(lambda x, *factors: lora_projections(x, layers, factors), (x, *factors))


def test_projections_of_which_one_output_is_used() -> None:
    layers, factors = projections()
    lora_projections(noise(5, 4), layers, factors)[1].sum().backward()
    assert not factors[0].grad.any()  # type: ignore[union-attr]
    assert factors[2].grad.any()  # type: ignore[union-attr]


def test_swiglu() -> None:
    gate, up = noise(3, 7), noise(3, 7)
    torch.testing.assert_close(swiglu(gate, up), silu(gate) * up)
    assert gradcheck(swiglu, (gate, up))


def test_rms_norm() -> None:
    x, weight = noise(2, 3, 7), noise(7, gradient=False)
    expected = torch.rms_norm(x, (7,), weight, 1e-5)
    torch.testing.assert_close(scaled_rms_norm(x, weight, 1e-5), expected)
    assert gradcheck(lambda x: scaled_rms_norm(x, weight, 1e-5), (x,))
    assert scaled_rms_norm(torch.zeros(2, 7), torch.ones(7), 1e-5).isfinite().all()


@pytest.mark.parametrize("function", [lambda: swiglu(noise(3, 7), noise(3, 7)), lambda: scaled_rms_norm(noise(3, 7), noise(7, gradient=False), 1e-5)])
def test_without_gradients_the_values_are_the_same(function: Any) -> None:
    GENERATOR.manual_seed(4)
    expected = function()
    GENERATOR.manual_seed(4)
    with torch.no_grad():
        torch.testing.assert_close(function(), expected)
