"""The operations of a Llama layer with gradients of their own: fewer passes over memory than what autograd would record.

Base weights are frozen, so they get no gradients here; everything else is exact (checked in float64). LoRA products are computed
in the factors' precision, norms in float32 at least, whatever that of the base. N: positions of all rows, r: rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from sdft_engine.products import frozen_linear, outer_sum, times_frozen


class Source(Protocol):
    """What some projections read: a cheap function of tensors that are kept anyway. It is computed again when gradients are due,
    which costs little and saves what it takes to keep its value."""

    def value(self, *inputs: Tensor) -> Tensor:
        """x (..., in)."""

    def again(self, *inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """x once more, and what turns its gradient into those of the inputs; x must not be used after that."""


class Itself:
    """The input as it is."""

    def value(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return x

    def again(self, *inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        (x,) = inputs
        return x, lambda gradient: (gradient,)


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; the weight is frozen (arXiv 1910.07467)."""

    weight: Tensor
    epsilon: float

    def value(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return (x * _inverse_rms(x, self.epsilon)).to(x.dtype).mul_(self.weight)

    def again(self, *inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        (x,) = inputs
        scale = _inverse_rms(x, self.epsilon)

        def pull(gradient: Tensor) -> tuple[Tensor, ...]:
            of_normed = (gradient * self.weight).to(scale.dtype)
            along = (of_normed * x).sum(dim=-1, keepdim=True).mul_(scale.pow(3) / -x.shape[-1])
            return (of_normed.mul_(scale).add_(x * along).to(x.dtype),)

        return (x * scale).to(x.dtype).mul_(self.weight), pull


class SwiGlu:
    """silu(gate) * up, elementwise (arXiv 2002.05202)."""

    def value(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        return silu(gate).mul_(up)

    def again(self, *inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        gate, up = inputs
        opened = silu(gate)

        def pull(gradient: Tensor) -> tuple[Tensor, ...]:
            return torch.ops.aten.silu_backward(gradient * up, gate), opened.mul_(gradient)

        return opened * up, pull


@dataclass(frozen=True)
class FrozenLinear:
    """A frozen layer and the scaling of the LoRA correction that is added to its output."""

    weight: Tensor
    bias: Tensor | None
    scaling: float


def lora_projections(source: Source, inputs: Sequence[Tensor], layers: Sequence[FrozenLinear], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """y_i = W_i x + b_i + s_i B_i A_i x for layers that read the same x (..., in), which is the source's value of the inputs.

    `factors`: A_1 (r, in), B_1 (out_1, r), A_2, B_2, ... Gradients flow to the inputs and to the factors. Only the inputs and the
    A_i x are kept for them.
    """
    outputs: tuple[Tensor, ...] = _LoraProjections.apply(source, tuple(layers), len(inputs), *inputs, *factors)  # type: ignore[no-untyped-call]
    return outputs


def scaled_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`RmsNorm` by itself."""
    norm = RmsNorm(weight, epsilon)
    if not torch.is_grad_enabled():
        return norm.value(x)
    normed: Tensor = _Norm.apply(x, norm)  # type: ignore[no-untyped-call]
    return normed


def rotated(x_BhTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) in halves: (a, b) to (a cos - b sin, b cos + a sin) for the halves a and b of
    each head's d numbers. `cos`, `sin`: of the d / 2 angles, broadcast to the halves."""
    if not torch.is_grad_enabled() or not x_BhTd.requires_grad:
        return _rotate(x_BhTd, cos, sin)
    out: Tensor = _Rotation.apply(x_BhTd, cos, sin)  # type: ignore[no-untyped-call]
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    (a, b), (new_a, new_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=new_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=new_b).addcmul_(a, sin)
    return out


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
    def forward(ctx: Any, source: Source, layers: tuple[FrozenLinear, ...], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, factors = tensors[:count], tensors[count:]
        x = source.value(*inputs)
        x_Nin = x.reshape(-1, x.shape[-1])
        a, b = torch.cat(factors[0::2]), factors[1::2]
        hidden_NR = frozen_linear(x_Nin.to(a.dtype), a)
        outputs = []
        for layer, up, h_Nr in zip(layers, b, hidden_NR.split([each.shape[1] for each in b], dim=1), strict=True):
            y = frozen_linear(x_Nin, layer.weight, layer.bias)
            add_correction(y, h_Nr, up, layer.scaling)
            outputs.append(y.view(*x.shape[:-1], -1))
        ctx.save_for_backward(*inputs, hidden_NR, a, *b)
        ctx.source, ctx.layers, ctx.count = source, layers, count
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, (hidden_NR, a, *b) = saved[: ctx.count], saved[ctx.count :]
        x, pull = ctx.source.again(*inputs)
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
            if any(ctx.needs_input_grad[3 : 3 + ctx.count]):
                part = times_frozen(gradient_Nout, layer.weight)
                of_x = part if of_x is None else of_x.add_(part)
        of_a = outer_sum(of_hidden_NR, x.reshape(-1, x.shape[-1]).to(a.dtype)).split(ranks)
        of_inputs: tuple[Tensor | None, ...] = (None,) * ctx.count
        if of_x is not None:
            of_inputs = pull(of_x.add_(times_frozen(of_hidden_NR, a).to(of_x.dtype)).view(x.shape))
        return None, None, None, *of_inputs, *(gradient for pair in zip(of_a, of_b, strict=True) for gradient in pair)


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RmsNorm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return norm.value(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, pull = ctx.norm.again(*ctx.saved_tensors)
        return *pull(gradient), None


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, -sin), None, None
