"""Products with weights that don't change, by the fastest kernels that torch has on this machine.

float32 products on a CPU go through MKL by default, which on CPUs of other makers does not use the widest vector instructions:
there oneDNN, which torch has too, is more than twice as fast. And with few rows, as a decoding step has them, a product is bound
by reading the weights; oneDNN's blocked layout, a second copy of them, is then read at the speed of memory (torch packs weights
so for compiled models). Which is faster is measured once a process and never assumed.
"""

import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

ROWS_HINT = 8
FEW_ROWS = 64
"""Up to so many rows the blocked layout is faster on every CPU."""
CLEARLY_FASTER = 1.3
PROBE_TRIES = 20
"""In turn, in one thread, by the processor's time that it takes, of which the least counts: so that what else runs on the machine does not
decide."""

_chosen: bool | None = None


@lru_cache
def onednn_is_available() -> bool:
    """Whether this build of torch has oneDNN's products, blocked ones too, and computes the right thing with them."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    weight, x, bias = torch.arange(24.0).view(6, 4), torch.eye(3, 4), torch.arange(6.0)
    expected = linear(x, weight, bias)
    try:
        plain, packed, turned = _onednn_linear(x, weight, bias), _onednn_linear(x, pack(weight), bias), _onednn_linear(expected, weight.T, None)
    except (RuntimeError, TypeError):  # torch's private operations: another version or platform may not take these arguments
        return False
    return torch.allclose(plain, expected) and torch.allclose(packed, expected) and torch.allclose(turned, expected @ weight)


def onednn_is_faster() -> bool:
    """Whether float32 products of many rows go through oneDNN: as was chosen, or else where it is clearly faster on this CPU."""
    return _is_measured_faster() if _chosen is None else _chosen


def choose_onednn(wanted: bool) -> bool:
    """Decide that for the rest of this process, so that a run which goes on computes as it began. Returns what was possible."""
    global _chosen
    _chosen = wanted and onednn_is_available()
    return _chosen


@lru_cache
def _is_measured_faster() -> bool:
    if not onednn_is_available():
        return False
    x, weight = torch.ones(384, 768), torch.ones(768, 768)
    kernels = (lambda: linear(x, weight), lambda: _onednn_linear(x, weight, None))
    fastest = [float("inf")] * len(kernels)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(PROBE_TRIES):
                for index, kernel in enumerate(kernels):
                    start = time.thread_time()
                    kernel()
                    fastest[index] = min(fastest[index], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return fastest[0] > CLEARLY_FASTER * fastest[1]


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (..., in) and W (out, in). Gradients flow to x alone."""
    if not _by_onednn(x):
        return linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return _onednn_linear(x, weight, bias)


def times_frozen(x: Tensor, weight: Tensor) -> Tensor:
    """x W for x (..., out) and W (out, in), without gradients: how a gradient passes through `frozen_linear`."""
    return _onednn_linear(x, weight.T, None) if _by_onednn(x) else x @ weight


def outer_sum(x: Tensor, y: Tensor) -> Tensor:
    """x^T y (p, q) for x (N, p) and y (N, q), without gradients: of a small p, the sum of outer products."""
    return _onednn_linear(x.T, y.T, None) if _by_onednn(x) else x.T @ y


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight (out, in) in oneDNN's blocked layout, only to be used with `packed_linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (..., in), without gradients."""
    return _onednn_linear(x, packed, bias)


def packs(weight: Tensor) -> bool:
    """Whether `pack` can take this weight."""
    return weight.device.type == "cpu" and onednn_is_available() and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _packs_bfloat16()))


@lru_cache
def _packs_bfloat16() -> bool:
    """CPUs without AVX-512 don't: torch raises there."""
    try:
        return torch.equal(packed_linear(x := torch.eye(4, dtype=torch.bfloat16), pack(x)), x)
    except RuntimeError:
        return False


def packed_is_faster(x: Tensor) -> bool:
    """Whether `packed_linear` is the fastest product with x (..., in). In bfloat16 torch has only oneDNN's."""
    return x.dtype == torch.bfloat16 or x.numel() // x.shape[-1] <= FEW_ROWS or onednn_is_faster()


def _by_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and onednn_is_faster()


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _onednn_linear(gradient, ctx.weight.T, None), None, None
