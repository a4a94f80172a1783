"""Which rows a step trains on, and how fast: functions of the step alone, so that a resumed run needs no memory of them."""

import math

import torch

from sdft_engine.seeds import seed_of


def rows_of_step(step: int, batch_size: int, row_count: int, seed: int, n_epochs: int) -> list[int]:
    """Rows of a step (1-based): epochs are seeded permutations laid end to end; the very last batch may be smaller."""
    positions = range((step - 1) * batch_size, min(step * batch_size, row_count * n_epochs))
    orders = {epoch: epoch_order(epoch, row_count, seed) for epoch in {position // row_count for position in positions}}
    return [orders[position // row_count][position % row_count] for position in positions]


def epoch_order(epoch: int, row_count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(row_count, generator=torch.Generator().manual_seed(seed_of(seed, "epoch", epoch))).tolist()
    return order


def learning_rate_at(step: int, total_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over ceil(warmup_ratio x total) steps, then a cosine towards zero, which is reached after the last step."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / max(1, total_steps - warmup)))
