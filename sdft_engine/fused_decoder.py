"""The decoder of Llama's kind: the same numbers as transformers' modules from fewer and faster operations.

A decoding step of a small batch is bound by reading the weights once and by the operations issued, of which transformers
issues several times as many as the mathematics needs. Here projections that read the same input (query, key, value; gate, up)
are one matrix, packed for products with few rows, and an adapter is two small products for all of them. Passes with gradients
use the functions of fused_functions.py, which keep less and touch memory less often.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from sdft_engine.attention import causal_attention, causal_attention_is_faster
from sdft_engine.fused_functions import FrozenLinear, Itself, RmsNorm, Source, SwiGlu, add_correction, lora_projections, rotated, scaled_rms_norm
from sdft_engine.lora import Active, LoraLinear
from sdft_engine.products import frozen_linear, pack, packed_is_faster, packed_linear, packs

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class Projections:
    """Linear layers of the same input with their adapters: x (..., in) to one output each. `source` makes x."""

    def __init__(self, source: Source, layers: list[LoraLinear]) -> None:
        self.source = source
        self.layers = layers
        self.sizes = [layer.base.out_features for layer in layers]
        biases = [layer.base.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat(biases)
        self.packed = pack(torch.cat([layer.base.weight for layer in layers])) if packs(layers[0].base.weight) else None
        self.gathered: tuple[str, Tensor, Tensor] | None = None

    def gather(self, adapter: str) -> None:
        """Put an adapter's factors together, (all ranks, in) and, scaled, (all outputs, all ranks), for products with few rows."""
        a, b = zip(*((layer.lora_A[adapter].detach(), layer.lora_B[adapter].detach() * layer.scaling[adapter]) for layer in self.layers), strict=True)
        self.gathered = adapter, torch.cat(a), torch.block_diag(*b)

    def __call__(self, active: Active, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One output for each layer; `inputs` are what the source makes x of."""
        if torch.is_grad_enabled() and isinstance(active, str):
            frozen = [FrozenLinear(layer.base.weight, layer.base.bias, layer.scaling[active]) for layer in self.layers]
            factors = [factor for layer in self.layers for factor in (layer.lora_A[active], layer.lora_B[active])]
            return lora_projections(self.source, inputs, frozen, factors)
        x = self.source.value(*inputs)
        if self.packed is None or not packed_is_faster(x):
            outputs = [frozen_linear(x, layer.base.weight, layer.base.bias) for layer in self.layers]
        else:
            y = packed_linear(x, self.packed, self.bias)
            if self.gathered is not None and self.gathered[0] == active:
                _, a, b = self.gathered
                add_correction(y.view(-1, y.shape[-1]), frozen_linear(x.reshape(-1, x.shape[-1]).to(a.dtype), a), b, 1.0)
                return y.split(self.sizes, dim=-1)
            outputs = list(y.split(self.sizes, dim=-1))
        for layer, y in zip(self.layers, outputs, strict=True):
            layer.add_correction(y, x, active)
        return tuple(outputs)


@dataclass(frozen=True)
class FusedLayer:
    qkv: Projections
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Projections
    gate_up: Projections
    down: Projections


@dataclass(frozen=True)
class _Pass:
    """What all layers of one pass share. `mask` and `in_blocks`: see `_attention_mask`; in blocks, causal_attention does without."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    in_blocks: bool
    cache: DynamicCache | None
    active: Active


class FusedDecoder:
    """Made by `fused_decoder_of`, used through `LanguageModel.hidden_states`."""

    def __init__(self, decoder: Any) -> None:
        config = decoder.config
        self.embeddings: Tensor = decoder.embed_tokens.weight
        self.rotary: nn.Module = decoder.rotary_emb
        self.final_norm: Tensor = decoder.norm.weight
        self.epsilon: float = config.rms_norm_eps
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.groups: int = config.num_attention_heads // config.num_key_value_heads
        self.layers = [_fused(layer, config.rms_norm_eps) for layer in decoder.layers]
        self.recomputes_layers = False
        """Whether passes with gradients and no cache keep only each layer's input and compute the rest again (gradient
        checkpointing)."""

    @contextmanager
    def gathered(self, adapter: str) -> Iterator[None]:
        """Inside the block passes with this adapter find its factors put together. They must not change in it."""
        projections = [p for layer in self.layers for p in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        try:
            for projection in projections:
                projection.gather(adapter)
            yield
        finally:
            for projection in projections:
                projection.gathered = None

    def __call__(self, input_ids_BT: Tensor, mask_BS: Tensor | None, position_ids_BT: Tensor | None, cache: DynamicCache | None, active: Active) -> Tensor:
        """Final hidden states (B, T, H). `mask_BS` is 0 for padding, over what the cache holds and the new tokens; `active`: the
        adapter of all rows, adapters by rows, or none."""
        new = input_ids_BT.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        positions_BT = torch.arange(past, past + new, device=input_ids_BT.device)[None] if position_ids_BT is None else position_ids_BT
        x_BTH = embedding(input_ids_BT, self.embeddings)
        cos_BTd, sin_BTd = self.rotary(x_BTH, positions_BT)
        half = self.head_size // 2  # rotary_emb gives every angle twice
        in_blocks = mask_BS is None and new > 1 and causal_attention_is_faster(x_BTH)
        this = _Pass(
            cos_BTd[:, None, :, :half],
            sin_BTd[:, None, :, :half],
            None if in_blocks else _attention_mask(mask_BS, new, past, x_BTH.device),
            in_blocks,
            cache,
            active,
        )
        recomputed = self.recomputes_layers and torch.is_grad_enabled() and cache is None
        for index, layer in enumerate(self.layers):
            if recomputed:
                x_BTH = checkpoint(self._layer, layer, index, x_BTH, this, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTH = self._layer(layer, index, x_BTH, this)
        return self._norm(x_BTH, self.final_norm)

    def _layer(self, layer: FusedLayer, index: int, x_BTH: Tensor, this: _Pass) -> Tensor:
        x_BTH = x_BTH + self._attention(layer, index, x_BTH, this)
        gate_BTF, up_BTF = layer.gate_up(this.active, x_BTH)
        return x_BTH + layer.down(this.active, gate_BTF, up_BTF)[0]

    def _attention(self, layer: FusedLayer, index: int, x_BTH: Tensor, this: _Pass) -> Tensor:
        rows, new, _ = x_BTH.shape
        q, k, v = (each.view(rows, new, -1, self.head_size).transpose(1, 2) for each in layer.qkv(this.active, x_BTH))
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = self._norm(q, layer.query_norm), self._norm(k, layer.key_norm)
        q, k = rotated(q, this.cos, this.sin), rotated(k, this.cos, this.sin)
        if this.cache is not None:
            k, v = this.cache.update(k, v, index)
        if this.in_blocks:
            out_BTH = causal_attention(q, k, v)
        elif new == 1:  # the queries that share a key head stand in for a sequence of queries: nothing is repeated
            q = q.reshape(rows, self.key_heads, self.groups, self.head_size)
            out = scaled_dot_product_attention(q, k, v, attn_mask=this.mask)
            out_BTH = out.reshape(rows, 1, -1)
        else:
            if torch.is_grad_enabled():  # on CPUs torch differentiates attention in bfloat16 at half the speed
                q, k, v = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (q, k, v))
            out = scaled_dot_product_attention(q, k, v, attn_mask=this.mask, is_causal=this.mask is None, enable_gqa=self.groups > 1)
            out_BTH = out.transpose(1, 2).reshape(rows, new, -1).to(x_BTH.dtype)
        return layer.output(this.active, out_BTH)[0]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return scaled_rms_norm(x, weight, self.epsilon)


def fused_decoder_of(decoder: Any) -> FusedDecoder | None:
    """The decoder in this form, or None where its family computes anything else. Call it after the LoRA layers are in."""
    config = decoder.config
    types = getattr(config, "layer_types", None) or ["full_attention"]
    plain = config.model_type in MODEL_TYPES and config.hidden_act == "silu" and set(types) == {"full_attention"}
    if not plain or (config.model_type == "mistral" and config.sliding_window is not None):
        return None
    return FusedDecoder(decoder)


def _fused(layer: Any, epsilon: float) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return FusedLayer(
        qkv=Projections(RmsNorm(layer.input_layernorm.weight, epsilon), [attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        output=Projections(Itself(), [attention.o_proj]),
        gate_up=Projections(RmsNorm(layer.post_attention_layernorm.weight, epsilon), [mlp.gate_proj, mlp.up_proj]),
        down=Projections(SwiGlu(), [mlp.down_proj]),
    )


def _attention_mask(mask_BS: Tensor | None, new: int, past: int, device: torch.device) -> Tensor | None:
    """True where a query may look, broadcast to (B, heads, T, S); None where the causal rule alone decides."""
    if mask_BS is None and (past == 0 or new == 1):
        return None
    allowed = torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)[None, None]
    if mask_BS is None:
        return allowed
    if new == 1:
        return mask_BS.bool()[:, None, None, :]
    padding_rows = allowed & mask_BS.bool()[:, None, None, :]
    own = torch.eye(new, past + new, dtype=torch.bool, device=device).roll(past, dims=1)
    return padding_rows | own  # a padded query looks at itself: a row without any key would be NaN
