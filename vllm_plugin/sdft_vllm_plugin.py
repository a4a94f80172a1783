"""LoRA on vLLM's CPU backend, corrected: loaded by vLLM in all its processes (`vllm.general_plugins`). And a door for its server.

In a batch, vLLM marks the rows that use no adapter with the index -1. Its kernels for GPUs skip them; those for the CPU (0.32) look
the index up in the stacked weights, where -1 is the last slot, so that a request for the base model is answered with some adapter's
weights whenever other requests run beside it (vllm-project/vllm pull requests 48421 and 49656 tell of it). Here the rows are grouped
by adapter instead, and rows without one are left alone. Grouping is faster too: no weights are copied for every token.
"""

import hmac
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import torch

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RequireKey:
    """ASGI middleware (`--middleware sdft_vllm_plugin.RequireKey`): asks every path but /health for the key in VLLM_API_KEY, before
    the body is read. vLLM itself (0.32) asks under some prefixes only; /adapters, which loads and unloads adapters, is not among them.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode() if os.environ.get("VLLM_API_KEY") else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == "/health" or self._allows(dict(scope["headers"]).get(b"authorization", b"")):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = b'{"error": {"message": "a valid bearer key is needed", "type": "invalid_request_error", "param": null, "code": 401}}'
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})

    def _allows(self, given: bytes) -> bool:
        return self._expected is None or hmac.compare_digest(given, self._expected)


def register() -> None:
    """Replace the kernels where vLLM runs on a CPU. Called once in every process."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for module in (lora_ops, torch_ops, punica_cpu):
        for kernel in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
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
