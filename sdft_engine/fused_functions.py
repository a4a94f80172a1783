"""The operations of a Llama layer with gradients of their own: fewer passes over memory than what autograd would record.

Base weights are frozen, so they get no gradients here; everything else is exact and dtype-agnostic (checked in float64).
N: positions of all rows, r: rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear, silu


@dataclass(frozen=True)
class FrozenLinear:
    """A frozen layer and the scaling of the LoRA correction that is added to its output."""

    weight: Tensor
    bias: Tensor | None
    scaling: float


def lora_projections(x: Tensor, layers: Sequence[FrozenLinear], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """y_i = W_i x + b_i + s_i B_i A_i x for layers that read the same x (..., in).

    `factors`: A_1 (r, in), B_1 (out_1, r), A_2, B_2, ... Gradients flow to x and to the factors. Only x and the A_i x are kept
    for them.
    """
    outputs: tuple[Tensor, ...] = _LoraProjections.apply(x, tuple(layers), *factors)  # type: ignore[no-untyped-call]
    return outputs


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; keeps its two inputs and nothing else."""
    if not torch.is_grad_enabled():
        return silu(gate).mul_(up)
    product: Tensor = _SwiGlu.apply(gate, up)  # type: ignore[no-untyped-call]
    return product


def scaled_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; the weight is frozen (arXiv 1910.07467)."""
    if not torch.is_grad_enabled():
        return (x * _inverse_rms(x, epsilon)).mul_(weight)
    normed: Tensor = _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return normed


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


class _LoraProjections(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[FrozenLinear, ...], *factors: Tensor) -> tuple[Tensor, ...]:
        x_Nin = x.reshape(-1, x.shape[-1])
        a, b = torch.cat(factors[0::2]), factors[1::2]
        hidden_NR = x_Nin @ a.T
        outputs = []
        for layer, up, h_Nr in zip(layers, b, hidden_NR.split([each.shape[1] for each in b], dim=1), strict=True):
            y = linear(x_Nin, layer.weight, layer.bias).addmm_(h_Nr, up.T, alpha=layer.scaling)
            outputs.append(y.view(*x.shape[:-1], -1))
        ctx.save_for_backward(x_Nin, hidden_NR, a, *b)
        ctx.layers, ctx.shape = layers, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_Nin, hidden_NR, a, *b = ctx.saved_tensors
        ranks = [each.shape[1] for each in b]
        of_hidden_NR = torch.empty_like(hidden_NR)
        of_x: Tensor | None = None
        of_b = []
        parts = zip(ctx.layers, b, gradients, hidden_NR.split(ranks, dim=1), of_hidden_NR.split(ranks, dim=1), strict=True)
        for layer, up, gradient, h_Nr, of_h_Nr in parts:
            gradient_Nout = gradient.reshape(-1, gradient.shape[-1])
            of_h_Nr.copy_(gradient_Nout @ up).mul_(layer.scaling)
            of_b.append((gradient_Nout.T @ h_Nr).mul_(layer.scaling))
            if ctx.needs_input_grad[0]:
                of_x = gradient_Nout @ layer.weight if of_x is None else of_x.addmm_(gradient_Nout, layer.weight)
        of_a = (of_hidden_NR.T @ x_Nin).split(ranks)
        if of_x is not None:
            of_x = of_x.addmm_(of_hidden_NR, a).view(ctx.shape)
        return of_x, None, *(gradient for pair in zip(of_a, of_b, strict=True) for gradient in pair)


class _SwiGlu(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        activated = gate * sigmoid
        of_up = gradient * activated
        slope = sigmoid.addcmul_(activated, 1 - sigmoid)  # d silu(g) / dg = s + g s (1 - s)
        return slope.mul_(up).mul_(gradient), of_up


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = _inverse_rms(x, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        of_normed = gradient * weight
        along = (of_normed * x).sum(dim=-1, keepdim=True).mul_(scale.pow(3) / -x.shape[-1])
        return of_normed.mul_(scale).addcmul_(x, along), None, None
