"""One training step's loss and gradient: SDFT's per-token divergence on rollouts, or cross-entropy on demonstrations.

The LM head runs on completion positions only, a chunk at a time: in each chunk the loss is differentiated at once down to
the hidden states, and only their gradient (N, H) is kept. So no (B, T, V) tensor ever exists, and the head is not computed
twice. The head is frozen, which makes this exact.

The loss is the mean over a sequence's loss tokens, then the mean over the sequences of the batch, as in the paper's released
code; a sequence without loss tokens (a clipped rollout) counts as zero.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdft_engine.batching import ScoredText, completion_hidden_states, passes
from sdft_engine.divergences import TokenLoss, entropy
from sdft_engine.importance import ImportanceCorrection, importance_weights
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel
from sdft_engine.prompt_cache import PromptCache
from sdft_engine.rollouts import Rollout
from sdft_engine.token_statistics import TokenStatistics
from sdft_engine.token_terms import TokenTerms, token_terms


@dataclass(frozen=True)
class PassBudget:
    """How many padded tokens a pass may hold: with gradients, and without."""

    student_tokens: int = 2048
    teacher_tokens: int = 4096


@dataclass(frozen=True)
class Objective:
    """What is minimised: a token's loss, the temperature by which both logits are divided, and how the rollouts of another
    sampler are weighted."""

    token_loss: TokenLoss = field(default_factory=TokenLoss)
    temperature: float = 1.0
    importance: ImportanceCorrection = "sequence"


def sdft_gradient(
    model: LanguageModel,
    rollouts: list[Rollout],
    masks: list[list[bool]],
    teacher_adapter: str,
    objective: Objective,
    budget: PassBudget,
    batch_size: int | None = None,
    prompt_cache: PromptCache | None = None,
) -> TokenStatistics:
    """Add the gradient of the SDFT loss to the student's factors. `batch_size`: sequences that the mean is over, where these
    rollouts are only a share of them. `prompt_cache`: of a teacher that never changes."""
    statistics = TokenStatistics()
    start = time.perf_counter()
    teacher_NH = _teacher_hidden_states(model, rollouts, teacher_adapter, budget.teacher_tokens, prompt_cache)
    model.wait()
    statistics.teacher_seconds = time.perf_counter() - start
    start = time.perf_counter()
    texts = [ScoredText(rollout.student_prompt_ids, rollout.completion_ids) for rollout in rollouts]
    weights = [[flag / sum(mask) / (batch_size or len(rollouts)) if flag else 0.0 for flag in mask] for mask in masks]
    for rows in passes(texts, budget.student_tokens):
        weights_N = _tensor([weight for row in rows for weight in weights[row]], model.device)
        _student_pass(model, {row: rollouts[row] for row in rows}, weights_N, torch.cat([teacher_NH[row] for row in rows]), objective, statistics)
    model.wait()
    statistics.student_seconds = time.perf_counter() - start
    return statistics


def _student_pass(
    model: LanguageModel, rollouts: dict[int, Rollout], weights_N: Tensor, teacher_NH: Tensor, objective: Objective, statistics: TokenStatistics
) -> None:
    """The gradient of some of the batch's rollouts, by their places in it. `weights_N`: of their tokens' losses, one rollout after
    the other, 0 where there is none; `teacher_NH`: of the same tokens."""
    targets = _tensor([token for rollout in rollouts.values() for token in rollout.completion_ids], model.device)
    mask_N = weights_N > 0  # before importance weights, which may be so small that they are zero
    divergences: list[Tensor] = []
    rewards: list[Tensor] = []

    def weigh(hidden_NH: Tensor) -> None:
        weights_N.mul_(_importance(model, hidden_NH, list(rollouts.values()), mask_N, objective, statistics))

    def chunk_loss(hidden_NH: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            teacher_logits_NV = model.logits(teacher_NH[part])
        terms = token_terms(objective.token_loss, teacher_logits_NV, model.logits(hidden_NH), targets[part], weights_N[part], objective.temperature)
        _observe(statistics, terms, mask_N[part])
        divergences.append(terms.divergence)
        rewards.append(terms.reward * mask_N[part])
        return terms.loss

    texts = [ScoredText(rollout.student_prompt_ids, rollout.completion_ids) for rollout in rollouts.values()]
    corrected = any(rollout.sampler_logps is not None for rollout in rollouts.values())
    statistics.loss += backward_through_head(model, texts, chunk_loss, weigh if corrected else None)
    lengths = [len(text.completion_ids) for text in texts]
    statistics.per_token |= {place: part.tolist() for place, part in zip(rollouts, torch.cat(divergences).split(lengths), strict=True)}
    statistics.rewards |= {place: float(part.sum()) for place, part in zip(rollouts, torch.cat(rewards).split(lengths), strict=True)}


def supervised_gradient(model: LanguageModel, texts: list[ScoredText], budget: PassBudget, batch_size: int | None = None) -> TokenStatistics:
    """Add the gradient of the cross-entropy of the demonstrations to the student's factors. `batch_size` as above."""
    statistics = TokenStatistics()
    start = time.perf_counter()
    for rows in passes(texts, budget.student_tokens):
        _supervised_pass(model, [texts[row] for row in rows], batch_size or len(texts), statistics)
    model.wait()
    statistics.student_seconds = time.perf_counter() - start
    return statistics


def _supervised_pass(model: LanguageModel, texts: list[ScoredText], batch_size: int, statistics: TokenStatistics) -> None:
    targets = _tensor([token for text in texts for token in text.completion_ids], model.device)
    weights_N = _tensor([1 / len(text.completion_ids) / batch_size for text in texts for _ in text.completion_ids], model.device)

    def chunk_loss(hidden_NH: Tensor, part: slice) -> Tensor:
        logps_NV = model.logits(hidden_NH).log_softmax(dim=-1)
        own_N = logps_NV.gather(1, targets[part, None])[:, 0]
        statistics.loss_tokens += len(own_N)
        statistics.correct_tokens += int((logps_NV.argmax(dim=-1) == targets[part]).sum())
        statistics.entropy_sum += float(entropy(logps_NV.detach()).sum())
        return -(own_N * weights_N[part]).sum()

    statistics.loss += backward_through_head(model, texts, chunk_loss)


@torch.no_grad()
def demonstration_loss(model: LanguageModel, texts: list[ScoredText], adapter: str, max_padded_tokens: int) -> tuple[float, float]:
    """Mean token cross-entropy (nats) and mean token accuracy of demonstrations under an adapter, for validation."""
    loss, correct, count = 0.0, 0, 0
    for rows in passes(texts, max_padded_tokens):
        chosen = [texts[row] for row in rows]
        with model.adapters.use(adapter):
            hidden_NH = completion_hidden_states(model, chosen)
        targets = _tensor([token for text in chosen for token in text.completion_ids], model.device)
        for part in model.chunks(len(hidden_NH)):
            logps_NV = model.logits(hidden_NH[part]).log_softmax(dim=-1)
            loss -= float(logps_NV.gather(1, targets[part, None]).sum())
            correct += int((logps_NV.argmax(dim=-1) == targets[part]).sum())
        count += len(targets)
    return loss / count, correct / count


def _teacher_hidden_states(
    model: LanguageModel, rollouts: list[Rollout], adapter: str, max_padded_tokens: int, prompt_cache: PromptCache | None
) -> list[Tensor]:
    """Per rollout, the teacher's hidden states (length, H) over the same token ids."""
    texts = [ScoredText(rollout.teacher_prompt_ids, rollout.completion_ids) for rollout in rollouts]
    found: dict[int, Tensor] = {}
    with torch.no_grad(), model.adapters.use(adapter, fold=model.fused is None and model.folds_adapters):
        kept = [prompt_cache is not None and prompt_cache.keeps(model, rollout.row) for rollout in rollouts]
        for cached in (True, False):
            places = [place for place, is_kept in enumerate(kept) if is_kept is cached]
            for part in passes([texts[place] for place in places], max_padded_tokens):
                chosen = [places[index] for index in part]
                chosen_texts = [texts[place] for place in chosen]
                if cached and prompt_cache is not None:
                    hidden_NH = prompt_cache.completion_hidden_states(model, [rollouts[place].row for place in chosen], chosen_texts)
                else:
                    hidden_NH = completion_hidden_states(model, chosen_texts)
                found.update(zip(chosen, hidden_NH.split([len(text.completion_ids) for text in chosen_texts]), strict=True))
    return [found[place] for place in range(len(texts))]


def backward_through_head(
    model: LanguageModel, texts: list[ScoredText], chunk_loss: Callable[[Tensor, slice], Tensor], before: Callable[[Tensor], None] | None = None
) -> float:
    """Forward the student, differentiate each chunk down to its hidden states, then these once through the decoder.

    `before` sees all hidden states (N, H) first, without gradients.
    """
    with model.adapters.use(STUDENT):
        hidden_NH = completion_hidden_states(model, texts)
        if before is not None:
            with torch.no_grad():
                before(hidden_NH.detach())
        gradient_NH = torch.zeros_like(hidden_NH)
        total = 0.0
        for part in model.chunks(len(hidden_NH)):
            leaf_NH = hidden_NH[part].detach().requires_grad_()
            loss = chunk_loss(leaf_NH, part)
            loss.backward()  # type: ignore[no-untyped-call]
            gradient_NH[part] = leaf_NH.grad
            total += loss.item()
        hidden_NH.backward(gradient_NH)  # type: ignore[no-untyped-call]
    return total


def _importance(
    model: LanguageModel, hidden_NH: Tensor, rollouts: list[Rollout], counted_N: Tensor, objective: Objective, statistics: TokenStatistics
) -> Tensor:
    """Importance weights (N,) of these rollouts' tokens, one after the other. Of the trainer's own rollouts they are ones. Ratios are
    taken at the sampling temperature, from log-probabilities at 1 (see sdft_engine.importance)."""
    targets = _tensor([token for rollout in rollouts for token in rollout.completion_ids], model.device)
    own_N = torch.cat([model.logits(hidden_NH[part]).log_softmax(dim=-1).gather(1, targets[part, None])[:, 0] for part in model.chunks(len(hidden_NH))])
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    weights = []
    for rollout, own_T, counted_T in zip(rollouts, own_N.split(lengths), counted_N.split(lengths), strict=True):
        if rollout.sampler_logps is None:
            weights.append(torch.ones_like(own_T))
            continue
        sampler_T, tau = _tensor(rollout.sampler_logps, model.device), objective.temperature
        weights_T, ratios_T = importance_weights(own_T / tau, sampler_T / tau, counted_T, objective.importance)
        statistics.ratio_sum += float(ratios_T[counted_T].sum())
        weights.append(weights_T)
    return torch.cat(weights)


def _observe(statistics: TokenStatistics, terms: TokenTerms, counted_N: Tensor) -> None:
    statistics.loss_tokens += int(counted_N.sum())
    if not counted_N.any():
        return
    statistics.entropy_sum += float(terms.entropy[counted_N].sum())
    statistics.correct_tokens += int(terms.agrees[counted_N].sum())
    statistics.divergence_max = max(statistics.divergence_max, float(terms.divergence[counted_N].max()))
    if terms.kept_mass is not None:
        statistics.top_k_mass_sum += float(terms.kept_mass[counted_N].sum())


def _tensor(values: list[int] | list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
