"""The operations of a Llama layer with gradients of their own: fewer passes over memory than what autograd would record.

Base weights are frozen, so they get no gradients here; everything else is exact (checked in float64). LoRA products are computed
in the factors' precision, norms in float32 at least, whatever that of the base. N: positions of all rows, r: rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import silu

from sdft_engine.products import frozen_linear, outer_sum, times_frozen


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
        return (x * _inverse_rms(x, epsilon)).to(x.dtype).mul_(weight)
    normed: Tensor = _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return normed


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    precision = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precision).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def add_correction(y: Tensor, h: Tensor, up: Tensor, scaling: float) -> None:
    """y += scaling h up^T for y (N, out), h (N, r), up (out, r), in place and without gradients."""
    if y.dtype == h.dtype:
        y.addmm_(h, up.T, alpha=scaling)
    else:
        y.add_(frozen_linear(h, up).mul_(scaling).to(y.dtype))  # torch adds tensors of two precisions slowly


class _LoraProjections(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[FrozenLinear, ...], *factors: Tensor) -> tuple[Tensor, ...]:
        x_Nin = x.reshape(-1, x.shape[-1])
        a, b = torch.cat(factors[0::2]), factors[1::2]
        hidden_NR = frozen_linear(x_Nin.to(a.dtype), a)
        outputs = []
        for layer, up, h_Nr in zip(layers, b, hidden_NR.split([each.shape[1] for each in b], dim=1), strict=True):
            y = frozen_linear(x_Nin, layer.weight, layer.bias)
            add_correction(y, h_Nr, up, layer.scaling)
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
            precise_Nout = gradient_Nout.to(up.dtype)
            of_h_Nr.copy_(times_frozen(precise_Nout, up)).mul_(layer.scaling)
            of_b.append(outer_sum(h_Nr, precise_Nout).mul_(layer.scaling).T)
            if ctx.needs_input_grad[0]:
                part = times_frozen(gradient_Nout, layer.weight)
                of_x = part if of_x is None else of_x.add_(part)
        of_a = outer_sum(of_hidden_NR, x_Nin.to(a.dtype)).split(ranks)
        if of_x is not None:
            of_x = of_x.add_(times_frozen(of_hidden_NR, a).to(of_x.dtype)).view(ctx.shape)
        return of_x, None, *(gradient for pair in zip(of_a, of_b, strict=True) for gradient in pair)


class _SwiGlu(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = _inverse_rms(x, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        of_normed = (gradient * weight).to(scale.dtype)
        along = (of_normed * x).sum(dim=-1, keepdim=True).mul_(scale.pow(3) / -x.shape[-1])
        return of_normed.mul_(scale).add_(x * along).to(x.dtype), None, None
