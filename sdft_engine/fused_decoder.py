"""The decoder of Llama's kind for passes without gradients: the same numbers from fewer and faster operations.

A decoding step of a small batch is bound by reading the weights once and by the operations issued; transformers' modules
issue several times as many as the mathematics needs. Where an adapter is folded (W + scaling B A, see lora.py), projections
that read the same input (query, key, value; gate, up) are one matrix, packed for products with few rows, so that a layer is
four products. Without folding the layers of lora.py are called, one adapter a row or none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm, scaled_dot_product_attention, silu
from transformers import DynamicCache

from sdft_engine.lora import LoraLinear
from sdft_engine.packed_linear import pack, packed_linear, packing_is_available

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class Projections:
    """Linear layers of the same input, as one: x (..., in) to (..., all of their outputs)."""

    def __init__(self, layers: list[LoraLinear]) -> None:
        self.layers = layers
        self.sizes = [layer.base.out_features for layer in layers]
        biases = [layer.base.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat(biases)
        self.packed: Tensor | None = None

    def fold(self, adapter: str) -> None:
        weight = self.layers[0].base.weight
        matrix = torch.empty(sum(self.sizes), weight.shape[1], dtype=weight.dtype)
        for layer, part in zip(self.layers, matrix.split(self.sizes), strict=True):
            layer.fold_into(part, adapter)
        self.packed = pack(matrix)

    def unfold(self) -> None:
        self.packed = None

    def __call__(self, x: Tensor, folded: bool) -> Tensor:
        if folded and self.packed is not None:
            return packed_linear(x, self.packed, self.bias)
        outputs = [layer(x) for layer in self.layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@dataclass(frozen=True)
class FusedLayer:
    input_norm: Tensor
    qkv: Projections
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Projections
    mlp_norm: Tensor
    gate_up: Projections
    down: Projections


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
        self.layers = [_fused(layer) for layer in decoder.layers]
        self.folded_adapter: str | None = None

    @contextmanager
    def folded(self, adapter: str) -> Iterator[None]:
        """Inside the block passes with this adapter compute with it folded in."""
        projections = [p for layer in self.layers for p in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        with torch.no_grad():
            for projection in projections:
                projection.fold(adapter)
        self.folded_adapter = adapter
        try:
            yield
        finally:
            self.folded_adapter = None
            for projection in projections:
                projection.unfold()

    def __call__(self, input_ids_BT: Tensor, mask_BS: Tensor | None, position_ids_BT: Tensor | None, cache: DynamicCache | None, folded: bool) -> Tensor:
        """Final hidden states (B, T, H). `mask_BS` is 0 for padding, over what the cache holds and the new tokens; `folded`:
        the adapter in use is the folded one."""
        new = input_ids_BT.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        positions_BT = torch.arange(past, past + new, device=input_ids_BT.device)[None] if position_ids_BT is None else position_ids_BT
        x_BTH = embedding(input_ids_BT, self.embeddings)
        cos_BTd, sin_BTd = self.rotary(x_BTH, positions_BT)
        rotation = cos_BTd[:, None], _signed(sin_BTd)[:, None]
        mask = _attention_mask(mask_BS, new, past, x_BTH.device)
        for index, layer in enumerate(self.layers):
            x_BTH = x_BTH + self._attention(layer, index, x_BTH, rotation, mask, cache, folded)
            gate_BTF, up_BTF = layer.gate_up(self._norm(x_BTH, layer.mlp_norm), folded).chunk(2, dim=-1)
            x_BTH = x_BTH + layer.down(silu(gate_BTF).mul_(up_BTF), folded)
        return self._norm(x_BTH, self.final_norm)

    def _attention(
        self, layer: FusedLayer, index: int, x_BTH: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: DynamicCache | None, folded: bool
    ) -> Tensor:
        rows, new, _ = x_BTH.shape
        heads = layer.qkv(self._norm(x_BTH, layer.input_norm), folded).view(rows, new, -1, self.head_size).transpose(1, 2)
        query_count = self.key_heads * self.groups
        q, k, v = heads.split([query_count, self.key_heads, self.key_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = self._norm(q, layer.query_norm), self._norm(k, layer.key_norm)
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        if cache is not None:
            k, v = cache.update(k, v, index)
        if new == 1:  # the queries that share a key head stand in for a sequence of queries: nothing is repeated
            q = q.reshape(rows, self.key_heads, self.groups, self.head_size)
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out_BTH = out.reshape(rows, 1, -1)
        else:
            out = scaled_dot_product_attention(
                q, k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1), attn_mask=mask, is_causal=mask is None
            )
            out_BTH = out.transpose(1, 2).reshape(rows, new, -1)
        return layer.output(out_BTH, folded)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.epsilon)


def fused_decoder_of(decoder: Any) -> FusedDecoder | None:
    """The decoder in this form, or None where its family computes anything else. Call it after the LoRA layers are in."""
    config = decoder.config
    types = getattr(config, "layer_types", None) or ["full_attention"]
    plain = config.model_type in MODEL_TYPES and config.hidden_act == "silu" and set(types) == {"full_attention"}
    if not packing_is_available() or not plain or (config.model_type == "mistral" and config.sliding_window is not None):
        return None
    return FusedDecoder(decoder)


def _fused(layer: Any) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return FusedLayer(
        input_norm=layer.input_layernorm.weight,
        qkv=Projections([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        output=Projections([attention.o_proj]),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=Projections([mlp.gate_proj, mlp.up_proj]),
        down=Projections([mlp.down_proj]),
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


def _signed(sin_BTd: Tensor) -> Tensor:
    """sin with its first half negated, so that rotating halves is one `roll`."""
    half = sin_BTd.shape[-1] // 2
    return torch.cat([-sin_BTd[..., :half], sin_BTd[..., half:]], dim=-1)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, signed_sin = rotation
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin
