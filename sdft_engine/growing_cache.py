"""A key-value cache that is written in place while it decodes: transformers' own copies all of it for every token."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS = 64
"""Room beyond what is needed now, at least; a long cache gets a quarter of its length."""


class GrowingLayer(DynamicLayer):
    """Keys and values (B, heads, T, d) at the beginning of larger tensors. Not for gradients. Whoever assigns `keys` and
    `values` anew (dropping rows, say) has them copied once, at the next update."""

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None
        self._written: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, length = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        owned = self._written is not None and self._written[0] is self.keys and self._written[1] is self.values
        if self._room is None or not owned or self._room[0].shape[-2] < length:
            capacity = length + max(SPARE_TOKENS, length // 4)
            room = tuple(states.new_empty(*states.shape[:-2], capacity, states.shape[-1]) for states in (key_states, value_states))
            if past:
                room[0][..., :past, :], room[1][..., :past, :] = self.keys, self.values
            self._room = room[0], room[1]
        self._room[0][..., past:length, :], self._room[1][..., past:length, :] = key_states, value_states
        self.keys, self.values = self._written = self._room[0][..., :length, :], self._room[1][..., :length, :]
        return self.keys, self.values


class GrowingCache(DynamicCache):
    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer


def new_cache() -> DynamicCache:
    """For what runs now: written in place, or with gradients."""
    return DynamicCache() if torch.is_grad_enabled() else GrowingCache()
