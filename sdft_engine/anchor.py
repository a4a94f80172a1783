"""The anchor: what the base answers to general questions, held on to while something new is learned.

In every step the student also reads the base's own answers to a few general questions, and

    weight * mean over these rows of the mean over their tokens of KL(base || student)

is added to the loss. Where the student still answers as the base did, this is nothing. Neither the data nor the samples of the
base have to come from anywhere: the questions are this project's own (`anchor_prompts.jsonl`), none of them is one of the
questions that measure retention, and the answers are the base's greedy ones. The idea of a small pull towards the base during
self-distillation is that of iSDFT (arXiv 2609.24646), which applies it to the training prompts; on those it would hold back
just what is to be learned, so here it stands on prompts of its own.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdft_engine.batching import ScoredText, completion_hidden_states, passes
from sdft_engine.divergences import TokenLoss
from sdft_engine.evaluation import greedy_answers
from sdft_engine.model import LanguageModel
from sdft_engine.ranks import Ranks
from sdft_engine.schedule import epoch_order
from sdft_engine.seeds import seed_of
from sdft_engine.step import PassBudget, backward_through_head
from sdft_engine.token_terms import token_terms

PROMPTS_PATH = Path(__file__).parent / "anchor_prompts.jsonl"
MAX_ANSWER_TOKENS = 32
ROWS_OF_STEP = 4


@dataclass(frozen=True)
class AnchorStatistics:
    """`kl`: mean over the step's anchor tokens of KL(base || student), nats. `tokens`: read for it, prompts included."""

    kl: float
    tokens: int
    seconds: float


class Anchor:
    """The base's answers and, of each of their tokens, the hidden state (H,) that the base predicts it from.

    Made before the first step; made anew when a run is resumed, it is the same.
    """

    def __init__(self, model: LanguageModel, weight: float, seed: int, budget: PassBudget) -> None:
        self.model = model
        self.weight = weight
        self.seed = seed
        prompts = [model.chat_format.prompt_ids([{"role": "user", "content": prompt}]) for prompt in read_prompts(PROMPTS_PATH)]
        answers = greedy_answers(model, prompts, None, MAX_ANSWER_TOKENS)
        self.texts = [ScoredText(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        self._base_hidden: dict[int, Tensor] = {}
        with torch.no_grad(), model.adapters.use(None):
            for rows in passes(self.texts, budget.teacher_tokens):
                chosen = [self.texts[row] for row in rows]
                hidden_NH = completion_hidden_states(model, chosen)
                self._base_hidden |= dict(zip(rows, hidden_NH.split([len(text.completion_ids) for text in chosen]), strict=True))

    def rows_of(self, step: int) -> list[int]:
        """The anchor's rows of a step (1-based): seeded permutations laid end to end."""
        count = len(self.texts)
        places = range((step - 1) * ROWS_OF_STEP, step * ROWS_OF_STEP)
        return [epoch_order(place // count, count, seed_of(self.seed, "anchor"))[place % count] for place in places]

    def add_gradient(self, step: int, ranks: Ranks, budget: PassBudget) -> AnchorStatistics:
        """Add the weighted gradient of this process's share of the step's rows to the student's factors."""
        start = time.perf_counter()
        rows = ranks.own(self.rows_of(step))
        kl_sum, count = 0.0, 0
        for places in passes([self.texts[row] for row in rows], budget.student_tokens):
            divergence_N = self._pass([rows[place] for place in places])
            kl_sum += float(divergence_N.sum())
            count += len(divergence_N)
        shares = ranks.collect((kl_sum, count, sum(self.texts[row].input_length for row in rows), time.perf_counter() - start))
        return AnchorStatistics(
            kl=sum(share[0] for share in shares) / sum(share[1] for share in shares),
            tokens=sum(share[2] for share in shares),
            seconds=max(share[3] for share in shares),
        )

    def _pass(self, rows: list[int]) -> Tensor:
        """The gradient of some rows; returns their tokens' KL (N,)."""
        texts = [self.texts[row] for row in rows]
        base_NH = torch.cat([self._base_hidden[row] for row in rows])
        targets_N = torch.tensor([token for text in texts for token in text.completion_ids], device=self.model.device)
        weights = [self.weight / ROWS_OF_STEP / len(text.completion_ids) for text in texts for _ in text.completion_ids]
        weights_N = torch.tensor(weights, device=self.model.device)
        divergences: list[Tensor] = []

        def chunk_loss(hidden_NH: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                base_logits_NV = self.model.logits(base_NH[part])
            terms = token_terms(TokenLoss("forward"), base_logits_NV, self.model.logits(hidden_NH), targets_N[part], weights_N[part])
            divergences.append(terms.divergence)
            return terms.loss

        backward_through_head(self.model, texts, chunk_loss)
        return torch.cat(divergences)


def read_prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines() if line.strip()]
