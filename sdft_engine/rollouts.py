"""On-policy rollouts: the student answers its prompts in its own words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdft_engine.generation import decode_all
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.seeds import seed_of
from sdft_engine.token_statistics import TokenStatistics


@dataclass(frozen=True)
class Rollout:
    """One sampled answer and the two prompts it is scored after."""

    row: int
    student_prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int]
    finished: bool
    """It ended by itself; False: cut off at max_completion_tokens."""
    sampler_logps: list[float] | None = None
    """Of every completion token by a sampler that is not the trainer, at temperature 1 whatever it sampled at; None: the trainer
    sampled."""

    def loss_mask(self, skip_first_tokens: int, mask_clipped: bool, answer_start: int = 0) -> list[bool]:
        """Tokens that give loss: all but the first min(skip, length // 4), and none of a clipped rollout if those are masked.

        `answer_start` is where the answer begins after the model's thoughts: its first tokens are left out by the same rule.
        """
        length = len(self.completion_ids)
        spans = {(0, length), (answer_start, length - answer_start)}
        skipped = {start + offset for start, count in spans for offset in range(min(skip_first_tokens, count // 4))}
        return [offset not in skipped and (self.finished or not mask_clipped) for offset in range(length)]


def sample_rollouts(
    model: LanguageModel,
    rows: Sequence[int],
    student_prompts: Sequence[list[int]],
    teacher_prompts: Sequence[list[int]],
    *,
    max_completion_tokens: int,
    temperature: float,
    seed: int,
    step: int,
    drafts: Mapping[int, list[int]] | None = None,
) -> list[Rollout]:
    """One completion per row, ending at any end-of-sequence id. The noise depends on (seed, step, row) alone. `drafts`, by the
    row's number: guesses at what it will say, which make this faster."""
    sequences = [
        Decoding(
            student_prompts[row],
            SamplingParams(max_completion_tokens, temperature, seed=seed_of(seed, step, row), stop_token_ids=model.chat_format.eos_token_ids),
            adapter=STUDENT,
            draft=(drafts or {}).get(row, []),
        )
        for row in rows
    ]
    with model.use(STUDENT):
        decode_all(model, sequences)
    return [
        Rollout(row, student_prompts[row], teacher_prompts[row], sequence.token_ids, sequence.finish_reason == "stop")
        for row, sequence in zip(rows, sequences, strict=True)
    ]


def write_rollouts(path: Path, model: LanguageModel, rollouts: list[Rollout], statistics: TokenStatistics) -> None:
    """One JSON line a rollout: its text, its implicit reward, its tokens and their divergence from the teacher, in nats."""
    path.parent.mkdir(exist_ok=True)
    lines = []
    for position, rollout in enumerate(rollouts):
        tokens = [model.chat_format.tokenizer.id_to_token(token) for token in rollout.completion_ids]
        divergence = [round(value, 5) for value in statistics.per_token[position]]
        record = {
            "row": rollout.row,
            "completion": model.chat_format.decode(rollout.completion_ids),
            "finished": rollout.finished,
            "implicit_reward": round(statistics.rewards[position], 5),
            "tokens": tokens,
            "per_token_divergence": divergence,
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n")
