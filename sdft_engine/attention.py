"""Causal attention over long rows on a CPU, from the same matrix products as the linear layers.

torch's fused attention multiplies blocks of 32 to 256 positions by MKL. Where oneDNN's products are the faster ones (see
products.py), scores of a block of queries against all keys before them are cheaper: a block is large enough for a fast product
and small enough to stay in the cache while it becomes probabilities. As in FlashAttention (arXiv 2205.14135) nothing of the
size T x S is kept; the backward pass computes the probabilities again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sdft_engine.products import frozen_linear, onednn_is_faster, outer_sum, times_frozen

BLOCK = 256
"""Queries of a head that are scored together."""
LONG = 512
"""Positions of a row from which on this is faster."""


def causal_attention_is_faster(x_BTH: Tensor) -> bool:
    """Whether `causal_attention` is the fastest for these hidden states, where nothing is padding."""
    return x_BTH.shape[1] >= LONG and x_BTH.dtype == torch.float32 and x_BTH.device.type == "cpu" and onednn_is_faster()


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (B, T, heads x d) for queries (B, heads, T, d), keys and values (B, key heads, S, d).

    Query t sees the keys up to S - T + t: what precedes the new positions, and of these those that are not after it. Heads
    share key heads in equal groups, one after the other.
    """
    out: Tensor = _CausalAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out.flatten(2)


class _CausalAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, heads, new, size = q.shape
        q, k, v = q * size**-0.5, k.contiguous(), v.contiguous()  # oneDNN is slow with weights that have gaps
        out_BTHd = q.new_empty(rows, new, heads, size)
        later = _later(q)
        for part in _parts(q, k):
            p_MS = _probabilities(part.queries_of(q), k[part.seen], part, later)
            out_BTHd[part.outputs] = part.apart(times_frozen(p_MS, v[part.seen])).transpose(0, 1)
        ctx.save_for_backward(q, k, v, out_BTHd)
        return out_BTHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out_BTHd = ctx.saved_tensors
        of_out_BHTd = gradients[0].transpose(1, 2)
        mean_BHT1 = (gradients[0] * out_BTHd).sum(dim=-1, keepdim=True).transpose(1, 2)  # of the probabilities' gradients, by the probabilities
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        later = _later(q)
        for part in _parts(q, k):
            q_Md, of_out_Md, k_Sd = part.queries_of(q), part.queries_of(of_out_BHTd), k[part.seen]
            p_MS = _probabilities(q_Md, k_Sd, part, later)
            of_v[part.seen].add_(outer_sum(of_out_Md, p_MS).T)
            of_scores_MS = frozen_linear(of_out_Md, v[part.seen]).sub_(part.queries_of(mean_BHT1)).mul_(p_MS)
            of_q[part.asked] = part.apart(times_frozen(of_scores_MS, k_Sd))
            of_k[part.seen].add_(outer_sum(q_Md, of_scores_MS).T)
        return of_q.mul_(q.shape[-1] ** -0.5), of_k, of_v


@dataclass(frozen=True)
class _Part:
    """A block of queries of the heads that share a key head, one row's: M = heads x queries of them, head after head."""

    asked: tuple[int, slice, slice]
    """Where they are among (B, heads, T, d)."""
    outputs: tuple[int, slice, slice]
    """And among (B, T, heads, d)."""
    seen: tuple[int, int, slice]
    """The keys up to the last query, among (B, key heads, S, d)."""

    def queries_of(self, x: Tensor) -> Tensor:
        """(B, heads, T, n) to (M, n)."""
        return x[self.asked].flatten(0, 1).contiguous()

    def apart(self, x: Tensor) -> Tensor:
        """(M, n) to (heads, queries, n)."""
        return x.unflatten(0, (self.asked[1].stop - self.asked[1].start, -1))


def _parts(q: Tensor, k: Tensor) -> Iterator[_Part]:
    rows, heads, new, _ = q.shape
    key_heads, keys = k.shape[1:3]
    groups = heads // key_heads
    for row in range(rows):
        for key_head in range(key_heads):
            sharing = slice(key_head * groups, (key_head + 1) * groups)
            for start in range(0, new, BLOCK):
                queries = slice(start, min(start + BLOCK, new))
                yield _Part((row, sharing, queries), (row, queries, sharing), (row, key_head, slice(0, keys - new + queries.stop)))


def _later(q: Tensor) -> Tensor:
    """What is added to a block's scores of its own positions: -inf after the diagonal."""
    return torch.full((BLOCK, BLOCK), -torch.inf, dtype=q.dtype).triu_(1)


def _probabilities(q_Md: Tensor, k_Sd: Tensor, part: _Part, later: Tensor) -> Tensor:
    """(M, S) of a part's queries over the keys that the last of them sees."""
    scores_MS = frozen_linear(q_Md, k_Sd)
    size = part.asked[2].stop - part.asked[2].start
    part.apart(scores_MS)[:, :, -size:].add_(later[:size, :size])
    return torch.softmax(scores_MS, dim=-1, out=scores_MS)
