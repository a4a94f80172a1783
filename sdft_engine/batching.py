"""Turning rows of different lengths into few, little padded forward passes, and reading off completion positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sdft_engine.growing_cache import new_cache
from sdft_engine.model import LanguageModel

LEAST_SHARED_TOKENS = 48
"""Prompt tokens that sharing must save to be worth a pass of its own."""


@dataclass(frozen=True)
class ScoredText:
    """A prompt and the completion whose tokens are scored after it. The prompt is never empty, the completion only where a line
    has no answer: such a text is never scored."""

    prompt_ids: list[int]
    completion_ids: list[int]

    @property
    def input_length(self) -> int:
        """The last completion token is only predicted, never read."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1


def passes(texts: Sequence[ScoredText], max_padded_tokens: int) -> Iterator[list[int]]:
    """Row indices of each pass: sorted by length, filled up to `max_padded_tokens` (rows x longest), at least one row."""
    rows = sorted(range(len(texts)), key=lambda row: texts[row].input_length)
    chosen: list[int] = []
    for row in rows:
        if chosen and (len(chosen) + 1) * texts[row].input_length > max_padded_tokens:
            yield chosen
            chosen = []
        chosen.append(row)
    if chosen:
        yield chosen


def completion_hidden_states(model: LanguageModel, texts: Sequence[ScoredText]) -> Tensor:
    """Hidden states (N, H) that predict every completion token, row after row, N = all completion lengths added up.

    Rows are padded on the right: with causal attention no real token sees padding, so no padding mask is needed. Tokens that
    all prompts begin with (a system message, tools) are computed once, with gradients where the model has them.
    """
    recomputed = model.recomputes_layers and torch.is_grad_enabled()  # a layer that is computed twice would put its keys into a cache twice
    shared = 0 if recomputed else shared_prefix_length([text.prompt_ids for text in texts])
    width = max(text.input_length for text in texts) - shared
    padded = [((text.prompt_ids + text.completion_ids[:-1]) + [0] * (width + shared - text.input_length))[shared:] for text in texts]
    inputs: dict[str, Any] = {}
    if shared:
        inputs["past_key_values"] = prefix_cache(model, texts[0].prompt_ids[:shared], len(texts))
        inputs["position_ids"] = torch.arange(shared, shared + width, device=model.device)[None].expand(len(texts), -1)
    hidden_BTH = model.hidden_states(torch.tensor(padded, device=model.device), **inputs)
    index = completion_index([len(text.prompt_ids) - 1 - shared for text in texts], texts, model.device)
    return hidden_BTH[index[0], index[1]]


def completion_index(firsts: Sequence[int], texts: Sequence[ScoredText], device: torch.device) -> Tensor:
    """Rows and columns (2, N) of the states that predict every completion token; `firsts`: the column of each row's first."""
    rows = [row for row, text in enumerate(texts) for _ in text.completion_ids]
    columns = [first + offset for first, text in zip(firsts, texts, strict=True) for offset in range(len(text.completion_ids))]
    return torch.tensor([rows, columns], device=device)


def shared_prefix_length(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with, always fewer than the shortest prompt; 0 where computing them once saves less than
    it costs."""
    first, last = min(prompts), max(prompts)
    length = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    length = min(length, min(map(len, prompts)) - 1)
    return length if length * (len(prompts) - 1) >= LEAST_SHARED_TOKENS else 0


def prefix_cache(model: LanguageModel, token_ids: list[int], rows: int) -> DynamicCache:
    """Keys and values of a prefix, computed once and seen by every row."""
    alone, cache = new_cache(), new_cache()
    model.hidden_states(torch.tensor([token_ids], device=model.device), past_key_values=alone)
    for index, layer in enumerate(alone.layers):
        cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
    return cache
