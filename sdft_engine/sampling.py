"""What an answer is to be like, and how its next token is chosen from logits: greedily, or by noise of its own seed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

MASS_BLOCK = 512
"""Probabilities that are added up together to find a token."""


@dataclass(frozen=True)
class SamplingParams:
    """`temperature` 0 is greedy. `logprobs`: None, or how many of the likeliest alternatives to record beside each token's
    own log-probability (of the unscaled distribution, as vLLM reports it). `logit_bias` by token id."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(eq=False)
class Decoding:
    """One answer being decoded. `token_ids` includes the stop token that ended it."""

    prompt_ids: list[int]
    params: SamplingParams
    adapter: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    draft: list[int] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.params.seed)

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if token_id in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.params.max_new_tokens:
            self.finish_reason = "length"


def sample(logits_BV: Tensor, sequences: Sequence[Decoding]) -> list[int]:
    """Choose one token per row by that row's parameters, recording log-probabilities where asked."""
    adjusted_BV = logits_BV
    if any(s.params.logit_bias or s.params.frequency_penalty or s.params.presence_penalty for s in sequences):
        adjusted_BV = torch.stack([_adjusted(row_V, s) for row_V, s in zip(logits_BV, sequences, strict=True)])
    chosen = _choose(adjusted_BV, sequences)
    for row, sequence in enumerate(sequences):
        if sequence.params.logprobs is not None:
            _record(logits_BV[row], sequence.params.logprobs, sequence)
            own = (logits_BV[row, chosen[row]] - logits_BV[row].logsumexp(dim=-1)).item()
            sequence.logprobs.append(own)
    return chosen


def _record(logits_V: Tensor, top: int, sequence: Decoding) -> None:
    if not top:
        sequence.top_logprobs.append({})
        return
    values, indices = (logits_V - logits_V.logsumexp(dim=-1)).topk(top)
    sequence.top_logprobs.append(dict(zip(indices.tolist(), values.tolist(), strict=True)))


def _adjusted(logits_V: Tensor, sequence: Decoding) -> Tensor:
    """Bias and repetition penalties as OpenAI defines them: subtracted from the logits by count and by presence."""
    params = sequence.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
        bias = torch.tensor(list(params.logit_bias.values()), device=logits_V.device)
        logits_V = logits_V.index_add(0, ids, bias)
    if (params.frequency_penalty or params.presence_penalty) and sequence.token_ids:
        ids, counts = torch.tensor(sequence.token_ids, device=logits_V.device).unique(return_counts=True)
        logits_V = logits_V.index_add(0, ids, -(params.frequency_penalty * counts + params.presence_penalty).to(logits_V.dtype))
    return logits_V


def _choose(logits_BV: Tensor, sequences: Sequence[Decoding]) -> list[int]:
    """Greedy, or where one uniform number from the sequence's own generator falls in the cumulative distribution."""
    drawn = [row for row, s in enumerate(sequences) if s.params.temperature > 0]
    chosen = [0] * len(sequences)
    greedy = [row for row, s in enumerate(sequences) if s.params.temperature == 0]
    for row, token in zip(greedy, logits_BV[greedy].argmax(dim=-1).tolist(), strict=True):
        chosen[row] = token
    if not drawn:
        return chosen
    drawn_BV = logits_BV if len(drawn) == len(sequences) else logits_BV[drawn]
    temperatures = [sequences[row].params.temperature for row in drawn]
    if set(temperatures) != {1.0}:
        drawn_BV = drawn_BV / torch.tensor(temperatures, device=logits_BV.device)[:, None]
    probabilities_BV = drawn_BV.softmax(dim=-1)
    for place, row in enumerate(drawn):
        if sequences[row].params.top_p < 1:
            probabilities_BV[place] = _nucleus(probabilities_BV[place], sequences[row].params.top_p)
    uniform_B1 = torch.stack([torch.rand(1, dtype=torch.float64, generator=sequences[row].generator) for row in drawn]).to(logits_BV.device)
    for row, token in zip(drawn, quantile(probabilities_BV, uniform_B1).tolist(), strict=True):
        chosen[row] = token
    return chosen


def quantile(probabilities_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """The token (B,) in whose share of the cumulative distribution each uniform number of [0, 1) falls; never one without mass.

    Masses (not necessarily adding up to one) are added up by blocks of the vocabulary, then within the one block that is meant:
    a cumulative sum over the whole of a large vocabulary takes longer than everything else about a token.
    """
    vocabulary = probabilities_BV.shape[1]
    whole = vocabulary - vocabulary % MASS_BLOCK
    sums_BK = probabilities_BV[:, :whole].unflatten(1, (-1, MASS_BLOCK)).sum(dim=-1)
    if whole < vocabulary:
        sums_BK = torch.cat([sums_BK, probabilities_BV[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    block_B1, rest_B1 = _in_which(sums_BK, uniform_B1)
    columns_BW = block_B1 * MASS_BLOCK + torch.arange(MASS_BLOCK, device=block_B1.device)
    beyond_BW = columns_BW >= vocabulary
    masses_BW = probabilities_BV.gather(1, columns_BW.masked_fill(beyond_BW, 0)).masked_fill(beyond_BW, 0.0)
    place_B1, _ = _in_which(masses_BW, rest_B1)
    return (block_B1 * MASS_BLOCK + place_B1)[:, 0].clamp(max=vocabulary - 1)  # where the logits are not finite; the loss will say so


def _in_which(masses_BN: Tensor, share_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The entry (B, 1) in which a share of the whole mass ends, and what share of that entry it takes."""
    cumulative_BN = masses_BN.cumsum(dim=-1, dtype=torch.float64)
    total_B1 = cumulative_BN[:, -1:]
    point_B1 = torch.minimum(share_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))  # never beyond the last entry that has mass
    index_B1 = torch.searchsorted(cumulative_BN, point_B1, right=True).clamp(max=masses_BN.shape[1] - 1)
    own_B1 = masses_BN.gather(1, index_B1).double()
    before_B1 = cumulative_BN.gather(1, index_B1) - own_B1
    return index_B1, ((point_B1 - before_B1) / own_B1).clamp(0.0, 1.0)


def _nucleus(probabilities_V: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of likeliest tokens whose mass reaches `top_p`."""
    ordered, index = probabilities_V.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    return probabilities_V.index_fill(0, index[before >= top_p], 0.0)
