"""Turning rows of different lengths into few, little padded forward passes, and reading off completion positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_engine.model import LanguageModel


@dataclass(frozen=True)
class ScoredText:
    """A prompt and the completion whose tokens are scored after it. Both are non-empty."""

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

    Rows are padded on the right: with causal attention no real token sees padding, so no mask is needed and attention runs
    in its fastest form.
    """
    width = max(text.input_length for text in texts)
    padded = [(text.prompt_ids + text.completion_ids[:-1]) + [0] * (width - text.input_length) for text in texts]
    hidden_BTH = model.hidden_states(torch.tensor(padded, device=model.device))
    rows = [row for row, text in enumerate(texts) for _ in text.completion_ids]
    columns = [len(text.prompt_ids) - 1 + offset for text in texts for offset in range(len(text.completion_ids))]
    index = torch.tensor([rows, columns], device=model.device)
    return hidden_BTH[index[0], index[1]]
