"""A frozen teacher's prompts, read once: their keys and values are kept for all epochs.

Such a teacher reads the same prompts in every epoch, and only the student's answers after them are new. Each prompt is read by
itself, and which prompts are kept depends on them and on the budget alone: a resumed run computes what an uninterrupted one
computes, bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from sdft_engine.batching import ScoredText, completion_index
from sdft_engine.growing_cache import new_cache
from sdft_engine.model import LanguageModel

DEFAULT_BUDGET_BYTES = 1 << 30


class PromptCache:
    """Of the given prompts, in their order, as many as the budget holds. The adapter in use must be the same at every call, and
    never change."""

    def __init__(self, prompts: Sequence[list[int]], budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        self.prompts = prompts
        self.budget_bytes = budget_bytes
        self._kept: set[int] | None = None
        self._states: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def keeps(self, model: LanguageModel, row: int) -> bool:
        """Whether this row's prompt is among those that are kept."""
        if self._kept is None:
            per_token = sum(keys.nbytes + values.nbytes for keys, values in self._read(model, [self.prompts[0][0]]))
            self._kept = set()
            left = self.budget_bytes
            for index, prompt in enumerate(self.prompts):
                if (left := left - per_token * (len(prompt) - 1)) < 0:
                    break
                self._kept.add(index)
        return row in self._kept

    @torch.no_grad()
    def completion_hidden_states(self, model: LanguageModel, rows: Sequence[int], texts: Sequence[ScoredText]) -> Tensor:
        """As batching.completion_hidden_states, for rows that are kept: (N, H)."""
        for row, text in zip(rows, texts, strict=True):
            if row not in self._states and len(text.prompt_ids) > 1:
                self._states[row] = self._read(model, text.prompt_ids[:-1])
        lengths = [len(text.prompt_ids) - 1 for text in texts]
        past, new = max(lengths), max(len(text.completion_ids) for text in texts)
        tokens = [[text.prompt_ids[-1], *text.completion_ids[:-1]] for text in texts]
        input_ids_BT = torch.tensor([row + [0] * (new - len(row)) for row in tokens], device=model.device)
        positions_BT = torch.tensor(lengths, device=model.device)[:, None] + torch.arange(new, device=model.device)
        inputs = {} if past == 0 else {"past_key_values": self._padded(rows, lengths, past)}
        mask_BS = (torch.arange(past + new, device=model.device) >= past - torch.tensor(lengths, device=model.device)[:, None]).long()
        padded = min(lengths) < past
        hidden_BTH = model.hidden_states(input_ids_BT, attention_mask=mask_BS if padded else None, position_ids=positions_BT, **inputs)
        index = completion_index([0] * len(texts), texts, model.device)
        return hidden_BTH[index[0], index[1]]

    @torch.no_grad()
    def _read(self, model: LanguageModel, token_ids: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, (1, heads, T, d) each."""
        cache = DynamicCache()
        model.hidden_states(torch.tensor([token_ids], device=model.device), past_key_values=cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _padded(self, rows: Sequence[int], lengths: Sequence[int], width: int) -> DynamicCache:
        """One cache of these rows, padded on the left."""
        cache = new_cache()
        for index, some in enumerate(self._states[rows[lengths.index(width)]]):
            whole = [states.new_zeros(len(rows), states.shape[1], width, states.shape[3]) for states in some]
            for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                if length:
                    for part, states in zip(whole, self._states[row][index], strict=True):
                        part[place, :, width - length :] = states[0]
            cache.update(whole[0], whole[1], index)
        return cache
