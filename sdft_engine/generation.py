"""Batched decoding, shared by rollouts and by the inference server.

`DecodingBatch` is continuous: sequences join between steps, rows of different adapters share a batch, a sequence that
ended leaves at once. What all prompts begin with is computed once; the rest is padded on the left; positions and mask are
kept per row, so a row's logits do not depend on its neighbours (up to floating point). Sampling noise is drawn per sequence
from its own seed: the same seed gives the same tokens whatever else is in the batch.

A sequence may bring a draft, a guess at its answer (see drafts.py). One pass then reads several tokens of the draft, and as
many of them are taken as the sequence would have chosen itself, noise included: its tokens are the same with any draft or with
none, only sooner.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache

from sdft_engine.batching import prefix_cache, shared_prefix_length
from sdft_engine.drafts import DraftLuck, next_tokens
from sdft_engine.growing_cache import new_cache
from sdft_engine.lora import RowGroup
from sdft_engine.model import LanguageModel
from sdft_engine.sampling import Decoding, sample

MAX_PROMPT_TOKENS = 4096
"""Padded prompt tokens that one pass reads: what it holds of every layer at a time."""
MAX_CACHED_TOKENS = 1 << 16
"""Positions of all rows: 3.7 GB of a 7B model with grouped heads in bfloat16."""


class DecodingBatch:
    """Sequences that are decoded together. Every method must be called from one thread."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.active: list[Decoding] = []
        self._cache: DynamicCache | None = None
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self._luck = DraftLuck()

    @torch.inference_mode()
    def add(self, sequences: Sequence[Decoding]) -> None:
        """Prefill, sample each sequence's first token, and let those that go on join the batch."""
        if not sequences:
            return
        prompts, cache = [s.prompt_ids for s in sequences], new_cache()
        one_adapter = len({s.adapter for s in sequences}) == 1
        shared = shared_prefix_length(prompts) if one_adapter and not self.model.has_windows else 0  # shorter prompts leave a gap after it
        if shared:
            with self._adapters_of(sequences):
                cache = prefix_cache(self.model, prompts[0][:shared], len(prompts))
        mask_BT = _left_padding_mask([len(prompt) - shared for prompt in prompts], self.model.device)
        width = mask_BT.shape[1]
        input_ids_BT = torch.tensor([[0] * (width + shared - len(prompt)) + prompt[shared:] for prompt in prompts], device=self.model.device)
        mask_BT = torch.cat([mask_BT.new_ones(len(prompts), shared), mask_BT], dim=1)
        self._advance(sequences, input_ids_BT, mask_BT, cache)
        self._join(list(sequences), cache, mask_BT)
        self._drop_finished()

    @torch.inference_mode()
    def step(self) -> None:
        """A token or, with drafts, several for every active sequence; those that ended leave."""
        if not self.active:
            return
        assert self._cache is not None
        if any(drafts := self._drafts()):
            self._take_from(drafts, self._cache)
            self._drop_finished()
            return
        input_ids_B1 = torch.tensor([[s.token_ids[-1]] for s in self.active], device=self.model.device)
        self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(self.active), 1)], dim=1)
        self._advance(self.active, input_ids_B1, self._mask_BT, self._cache)
        self._drop_finished()

    @torch.inference_mode()
    def remove(self, sequence: Decoding) -> None:
        """Take a sequence out before its end (its client left)."""
        self._keep([row for row, other in enumerate(self.active) if other is not sequence])

    def _advance(self, sequences: Sequence[Decoding], input_ids_BT: Tensor, mask_BT: Tensor, cache: DynamicCache) -> None:
        logits_BV = self.model.logits(self._hidden_states(sequences, input_ids_BT, mask_BT, cache)[:, -1])
        for sequence, token_id in zip(sequences, sample(logits_BV, sequences), strict=True):
            sequence.append(token_id)

    def _hidden_states(self, sequences: Sequence[Decoding], input_ids_BT: Tensor, mask_BT: Tensor, cache: DynamicCache) -> Tensor:
        positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids_BT.shape[1] :]
        padded = bool((mask_BT == 0).any())
        with self._adapters_of(sequences):
            return self.model.hidden_states(input_ids_BT, attention_mask=mask_BT if padded else None, position_ids=positions_BT, past_key_values=cache)

    def _drafts(self) -> list[list[int]]:
        """What each active sequence proposes next. Only for models whose attention is by position alone: drafts leave columns
        behind that no row uses, over which a window would be counted wrong."""
        if self.model.fused is None:
            return []
        width = self._luck.width(len(self.active))
        return [next_tokens(s.draft, s.token_ids, min(width, s.params.max_new_tokens - len(s.token_ids) - 1)) for s in self.active]

    def _take_from(self, drafts: list[list[int]], cache: DynamicCache) -> None:
        """Read every row's last token and its draft, and append what the row chooses until that differs from the draft."""
        rows, width = len(self.active), 1 + max(map(len, drafts))
        tokens = [[s.token_ids[-1], *draft] for s, draft in zip(self.active, drafts, strict=True)]
        input_ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=self.model.device)
        mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(rows, width)], dim=1)
        hidden_BTH = self._hidden_states(self.active, input_ids_BT, mask_BT, cache)
        logits_BTV = self.model.logits(hidden_BTH.reshape(rows * width, -1)).view(rows, width, -1)
        going, taken = list(range(rows)), [0] * rows
        for place in range(width):
            chosen = sample(logits_BTV[going, place], [self.active[row] for row in going])
            for row, token_id in zip(going, chosen, strict=True):
                self.active[row].append(token_id)
                taken[row] += 1
            going = [
                row
                for row, token_id in zip(going, chosen, strict=True)
                if place < len(drafts[row]) and drafts[row][place] == token_id and self.active[row].finish_reason is None
            ]
            if not going:
                break
        used_BT = torch.arange(width, device=self.model.device) < torch.tensor(taken, device=self.model.device)[:, None]
        self._mask_BT = torch.cat([self._mask_BT, used_BT.long()], dim=1)
        self._luck.observe(sum(map(len, drafts)), sum(taken) - rows)

    def _adapters_of(self, sequences: Sequence[Decoding]) -> AbstractContextManager[None]:
        names = {s.adapter for s in sequences}
        adapters = self.model.adapters
        if len(names) == 1:
            name = names.pop()
            if name is not None and name == adapters.routing.folded:
                return nullcontext()
            return adapters.use(name)
        rows = {name: [row for row, s in enumerate(sequences) if s.adapter == name] for name in names if name is not None}
        return adapters.use([RowGroup(name, torch.tensor(index, device=self.model.device)) for name, index in rows.items()])

    def _join(self, sequences: list[Decoding], cache: DynamicCache, mask_BT: Tensor) -> None:
        if self._cache is None or not self.active:
            self.active, self._cache, self._mask_BT = sequences, cache, mask_BT
            return
        width = max(self._mask_BT.shape[1], mask_BT.shape[1])
        for mine, new in zip(self._cache.layers, cache.layers, strict=True):
            mine.keys = torch.cat([_pad_left(mine.keys, width), _pad_left(new.keys, width)])
            mine.values = torch.cat([_pad_left(mine.values, width), _pad_left(new.values, width)])
        self._mask_BT = torch.cat([_pad_mask(self._mask_BT, width), _pad_mask(mask_BT, width)])
        self.active = self.active + sequences

    def _drop_finished(self) -> None:
        if any(s.finish_reason for s in self.active):
            self._keep([row for row, s in enumerate(self.active) if s.finish_reason is None])

    def _keep(self, rows: list[int]) -> None:
        """Keep these rows, and of the columns those that some row still uses."""
        if len(rows) == len(self.active):
            return
        self.active = [self.active[row] for row in rows]
        if not rows or self._cache is None:
            self._cache, self._mask_BT = None, self._mask_BT[:0, :0]
            return
        index = torch.tensor(rows, device=self.model.device)
        self._mask_BT = self._mask_BT[index]
        first = int((self._mask_BT.sum(dim=0) > 0).nonzero()[0])
        self._mask_BT = self._mask_BT[:, first:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[index, :, first:].contiguous()
            layer.values = layer.values[index, :, first:].contiguous()


def decode_all(
    model: LanguageModel,
    sequences: Sequence[Decoding],
    max_batch: int = 64,
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
    max_cached_tokens: int = MAX_CACHED_TOKENS,
    before_pass: Callable[[], None] = lambda: None,
) -> None:
    """Decode every sequence to its end, at most `max_batch` at a time, of which one pass reads at most `max_prompt_tokens`
    of padded prompts (or one prompt, however long), and whose keys and values take at most `max_cached_tokens` positions when all
    of them get as long as they may (or one sequence's, however long). `before_pass` may raise to end it."""
    batch = DecodingBatch(model)
    waiting = sorted(sequences, key=lambda sequence: len(sequence.prompt_ids))
    while waiting or batch.active:
        before_pass()
        room = min(max_batch, max(1, max_cached_tokens // max(map(_longest, [*waiting, *batch.active]))))
        while waiting and len(batch.active) < room:
            newcomers = 1
            while newcomers < min(len(waiting), room - len(batch.active)) and (newcomers + 1) * len(waiting[newcomers].prompt_ids) <= max_prompt_tokens:
                newcomers += 1
            batch.add(waiting[:newcomers])
            waiting = waiting[newcomers:]
        batch.step()


def _longest(sequence: Decoding) -> int:
    return len(sequence.prompt_ids) + sequence.params.max_new_tokens


@torch.inference_mode()
def score(model: LanguageModel, token_ids: list[int], adapter: str | None, top: int = 0) -> tuple[list[float], list[dict[int, float]]]:
    """Natural log-probabilities of `token_ids[1:]` given what precedes each, and the `top` likeliest alternatives."""
    with model.adapters.use(adapter):
        hidden_TH = model.hidden_states(torch.tensor([token_ids[:-1]], device=model.device))[0]
    own: list[float] = []
    alternatives: list[dict[int, float]] = []
    targets = torch.tensor(token_ids[1:], device=model.device)
    for part in model.chunks(len(hidden_TH)):
        logps_NV = model.logits(hidden_TH[part]).log_softmax(dim=-1)
        own += logps_NV.gather(1, targets[part, None])[:, 0].tolist()
        if top:
            values, indices = logps_NV.topk(top, dim=-1)
            alternatives += [dict(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
    return own, alternatives


def _left_padding_mask(lengths: list[int], device: torch.device) -> Tensor:
    width = max(lengths)
    return torch.tensor([[0] * (width - length) + [1] * length for length in lengths], device=device)


def _pad_left(states_BhTd: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(states_BhTd, (0, 0, width - states_BhTd.shape[2], 0))


def _pad_mask(mask_BT: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask_BT, (width - mask_BT.shape[1], 0))
