"""sdft_engine.fused_functions: values and gradients against autograd and finite differences, in float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import silu

from sdft_engine.fused_functions import FrozenLinear, Itself, RmsNorm, Source, SwiGlu, lora_projections, rotated, scaled_rms_norm

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
    for layer, a, b, found in zip(layers, factors[0::2], factors[1::2], lora_projections(Itself(), [x], layers, factors), strict=True):
        expected = x @ layer.weight.T + layer.scaling * (x @ a.T @ b.T) + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("input_needs_gradient", [True, False])
def test_gradients_of_projections(input_needs_gradient: bool) -> None:
    layers, factors = projections()
    x = noise(2, 5, 4, gradient=input_needs_gradient)
    assert gradcheck(lambda x, *factors: lora_projections(Itself(), [x], layers, factors), (x, *factors))


def test_projections_of_which_one_output_is_used() -> None:
    layers, factors = projections()
    lora_projections(Itself(), [noise(5, 4)], layers, factors)[1].sum().backward()
    assert not factors[0].grad.any()  # type: ignore[union-attr]
    assert factors[2].grad.any()  # type: ignore[union-attr]


def test_gradients_of_projections_of_a_norm_and_of_a_gated_product() -> None:
    layers, factors = projections()
    x, gate, up = noise(2, 5, 4), noise(2, 5, 4), noise(2, 5, 4)
    norm = RmsNorm(noise(4, gradient=False), 1e-5)
    torch.testing.assert_close(norm.value(x), torch.rms_norm(x, (4,), norm.weight, 1e-5))
    torch.testing.assert_close(SwiGlu().value(gate, up), silu(gate) * up)
    sources: list[tuple[Source, list[Tensor]]] = [(norm, [x]), (SwiGlu(), [gate, up])]
    for source, inputs in sources:
        count = len(inputs)
        value = source.value(*inputs).detach()
        for found, expected in zip(lora_projections(source, inputs, layers, factors), lora_projections(Itself(), [value], layers, factors), strict=True):
            torch.testing.assert_close(found, expected)

        def made(*tensors: Tensor, source: Source = source, count: int = count) -> tuple[Tensor, ...]:
            return lora_projections(source, tensors[:count], layers, tensors[count:])

        assert gradcheck(made, (*inputs, *factors))


def test_what_is_kept_for_gradients_is_the_inputs_and_not_what_is_made_of_them() -> None:
    layers, factors = projections()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)), lambda _: None):
        lora_projections(SwiGlu(), [noise(5, 4), noise(5, 4)], layers, factors)
        lora_projections(RmsNorm(noise(4, gradient=False), 1e-5), [noise(5, 4)], layers, factors)
    assert kept == [(5, 4), (5, 4), (5, 4), (4, 4), (6, 2), (3, 2), (5, 4), (5, 4), (4, 4), (6, 2), (3, 2)]


def test_rms_norm() -> None:
    x, weight = noise(2, 3, 7), noise(7, gradient=False)
    expected = torch.rms_norm(x, (7,), weight, 1e-5)
    torch.testing.assert_close(scaled_rms_norm(x, weight, 1e-5), expected)
    assert gradcheck(lambda x: scaled_rms_norm(x, weight, 1e-5), (x,))
    assert scaled_rms_norm(torch.zeros(2, 7), torch.ones(7), 1e-5).isfinite().all()


def test_a_norm_without_gradients_has_the_same_value() -> None:
    x, weight = noise(3, 7), noise(7, gradient=False)
    expected = scaled_rms_norm(x, weight, 1e-5).detach()
    with torch.no_grad():
        torch.testing.assert_close(scaled_rms_norm(x, weight, 1e-5), expected)


def test_rotation() -> None:
    """Heads next to each other in memory, as a decoder has them."""
    x = noise(2, 5, 3, 8, gradient=False).transpose(1, 2).requires_grad_()
    angles = noise(2, 1, 5, 4, gradient=False)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.split(4, dim=-1)
    found = rotated(x, cos, sin)
    torch.testing.assert_close(found, torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
    assert gradcheck(lambda x: rotated(x, cos, sin), (x,))
    with torch.no_grad():
        assert torch.equal(rotated(x, cos, sin), found)
