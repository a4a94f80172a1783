"""Linear layers whose weights lie in oneDNN's blocked layout: products with few rows then run at the speed of memory.

A decoding step multiplies a handful of rows with every weight of the model. The general product that `linear` calls in
float32 on a CPU reads weights at a fraction of the memory's speed then; with many rows there is no difference. torch packs
weights so for compiled models; the operators are the same.
"""

import torch
from torch import Tensor

ROWS_HINT = 8


def packing_is_available() -> bool:
    """Whether this build of torch packs, and computes the right thing with it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    weight, x, bias = torch.arange(24.0).view(6, 4), torch.eye(3, 4), torch.arange(6.0)
    return torch.allclose(packed_linear(x, pack(weight), bias), torch.nn.functional.linear(x, weight, bias))


def pack(weight: Tensor) -> Tensor:
    """A copy of a float32 weight (out, in), only to be used with `packed_linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (..., in), without gradients."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y
