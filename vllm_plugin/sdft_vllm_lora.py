"""LoRA on vLLM's CPU backend, corrected: loaded by vLLM in all its processes (`vllm.general_plugins`).

In a batch, vLLM marks the rows that use no adapter with the index -1. Its kernels for GPUs skip them; those for the CPU (0.32) look
the index up in the stacked weights, where -1 is the last slot, so that a request for the base model is answered with some adapter's
weights whenever other requests run beside it (vllm-project/vllm pull requests 48421 and 49656 tell of it). Here the rows are grouped
by adapter instead, and rows without one are left alone. Grouping is faster too: no weights are copied for every token.
"""

from collections.abc import Iterator

import torch


def register() -> None:
    """Replace the kernels where vLLM runs on a CPU. Called once in every process.

    Raises RuntimeError where this vLLM has none by these names: its adapters would go uncorrected, and nobody would notice.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for module in (lora_ops, torch_ops, punica_cpu):
        for kernel in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
            if not hasattr(module, kernel.__name__):
                raise RuntimeError(f"{module.__name__} has no {kernel.__name__}: the plugin sdft-vllm-plugin does not know this version of vLLM")
            setattr(module, kernel.__name__, kernel)


def bgmv_shrink(
    inputs: torch.Tensor, lora_b_weights: torch.Tensor, output_tensor: torch.Tensor, lora_indices_tensor: torch.Tensor, scaling: float = 1.0
) -> None:
    """y = scaling A x. Inputs (rows, in), weights (slots, [1,] rank, in), output (rows, at least rank)."""
    rank = lora_b_weights.shape[-2]
    output_tensor[:, :rank] = 0
    for rows, weight in _groups(lora_b_weights, lora_indices_tensor, inputs):
        output_tensor[rows, :rank] = (inputs[rows].to(output_tensor.dtype) @ weight.to(output_tensor.dtype).T) * scaling


def bgmv_expand(
    inputs: torch.Tensor, lora_b_weights: torch.Tensor, output_tensor: torch.Tensor, lora_indices_tensor: torch.Tensor, add_inputs: bool = True
) -> None:
    """y (+)= B h. Inputs (rows, rank), weights (slots, [1,] out, rank), output (rows, out); either may be padded to more columns."""
    columns = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    bgmv_expand_slice(inputs, lora_b_weights[..., :columns, :], output_tensor, lora_indices_tensor, 0, columns, add_inputs)


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """The same into columns `slice_offset` to `slice_offset + slice_size` of the output, as packed projections have it."""
    columns = output_tensor[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        columns.zero_()
    for rows, weight in _groups(lora_b_weights, lora_indices_tensor, inputs):
        columns[rows] += inputs[rows].to(output_tensor.dtype) @ weight.to(output_tensor.dtype).T


def _groups(weights: torch.Tensor, indices: torch.Tensor, inputs: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rows of each adapter with its weight, as two dimensions. Raises ValueError where not every row has an index."""
    if len(indices) == 1:
        indices = indices.expand(len(inputs))
    if len(indices) != len(inputs):
        raise ValueError(f"{len(inputs)} rows have {len(indices)} adapter indices")
    for index in indices.unique().tolist():
        if index >= 0:
            yield (indices == index).nonzero()[:, 0], weights[index].reshape(weights.shape[-2:])
