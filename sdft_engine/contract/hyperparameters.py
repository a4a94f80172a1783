"""Hyperparameters: what a user may write, and how every `"auto"` becomes a number.

`SdftHyperparameters` and `SupervisedHyperparameters` are the wire forms (numbers or "auto"); `resolve_sdft` and
`resolve_supervised` turn them into the resolved forms that the trainer runs with and the job object shows. The rule
behind each automatic value stands where it is computed. Torch-free.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Auto = Literal["auto"]
Wire = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

NOT_YET_AVAILABLE = {
    "baseline": ("sft_matched",),
}
"""Values of known fields that this version refuses, by field."""

FIELDS_NOT_YET_AVAILABLE = ("max_retention_drop",)
"""Known fields that this version refuses whenever they are given."""

TOKENS_WITHOUT_AN_ANSWER = 128
"""Taken for an answer's length where no line has one."""
REASONING_TOKENS = 4096

Epochs = Annotated[int, Field(ge=1, le=50)]
BatchSize = Annotated[int, Field(ge=1, le=256)]
LearningRate = Annotated[float, Field(ge=1e-7, le=1e-2)]
Multiplier = Annotated[float, Field(ge=0.01, le=100)]
Interval = Annotated[int, Field(ge=1, le=10_000)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SupervisedHyperparameters(BaseModel):
    """`method.supervised.hyperparameters`: plain supervised fine-tuning on the demonstrations."""

    model_config = Wire

    n_epochs: Epochs | Auto = "auto"
    batch_size: BatchSize | Auto = "auto"
    learning_rate: LearningRate | Auto = "auto"
    learning_rate_multiplier: Multiplier | Auto = "auto"
    lora_rank: int = Field(16, ge=1, le=256)
    lora_alpha: Annotated[int, Field(ge=1, le=1024)] | Auto = "auto"
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    checkpoint_every_steps: Interval | Auto = "auto"
    anchor_weight: float = Field(0.0, ge=0, le=10)

    @field_validator("learning_rate_multiplier")
    @classmethod
    def _scales_only_the_automatic_rate(cls, value: float | Auto, info: ValidationInfo) -> float | Auto:
        if value != "auto" and info.data.get("learning_rate", "auto") != "auto":
            raise ValueError("learning_rate_multiplier scales the automatic learning rate: give it or learning_rate, not both")
        return value


class _LossRules(BaseModel):
    """What fits together, in both forms."""

    @field_validator("estimator", check_fields=False)
    @classmethod
    def _samples_only_the_reverse_divergence(cls, value: str, info: ValidationInfo) -> str:
        if value == "sampled" and info.data.get("divergence", "reverse") != "reverse":
            raise ValueError('"sampled" estimates the reverse divergence only: set divergence to "reverse", or estimator to "full" or "top_k"')
        return value

    @field_validator("teacher_start", check_fields=False)
    @classmethod
    def _starts_something(cls, value: str, info: ValidationInfo) -> str:
        if value == "base" and info.data.get("teacher") == "live":
            raise ValueError('the teacher "live" is the student itself, and starts where that does: leave teacher_start out')
        return value

    @field_validator("entry_clip", check_fields=False)
    @classmethod
    def _clips_entries_that_are_computed(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("estimator") == "sampled":
            raise ValueError('the estimator "sampled" looks at one entry of the vocabulary only: use token_clip')
        return value


class SdftHyperparameters(SupervisedHyperparameters, _LossRules):
    """`method.sdft.hyperparameters`."""

    max_completion_tokens: Annotated[int, Field(ge=1, le=32_768)] | Auto = "auto"
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    estimator: Literal["full", "top_k", "sampled"] = "full"
    top_k: int = Field(128, ge=8, le=1024)
    entry_clip: Annotated[float, Field(gt=0)] | None = None
    token_clip: Annotated[float, Field(gt=0)] | None = None
    teacher: Literal["ema", "frozen", "live"] = "ema"
    ema_rate: float = Field(0.02, gt=0, lt=1)
    teacher_start: Literal["parent", "base"] = "parent"
    temperature: Annotated[float, Field(ge=0.1, le=2)] | Auto = "auto"
    skip_first_tokens: int = Field(3, ge=0, le=32)
    skip_after_think: bool = False
    mask_clipped_completions: bool | Auto = "auto"
    weight_decay: float = Field(0.0, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    over_length: Literal["reject", "drop"] = "reject"


class ResolvedSupervised(BaseModel):
    """Numbers only, whatever makes sense: how much of it a user may ask for is the wire form's to say. Two values of an sdft run
    may still be "auto", because they depend on what the model does: the trainer
    settles `temperature` by measuring the teacher and `mask_clipped_completions` by the student's first rollouts."""

    model_config = ConfigDict(extra="forbid")

    n_epochs: Count
    batch_size: Count
    learning_rate: Positive
    lora_rank: Count
    lora_alpha: Count
    warmup_ratio: Annotated[float, Field(ge=0, le=1)]
    checkpoint_every_steps: Count
    anchor_weight: NotNegative = 0.0
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0


class ResolvedSdft(ResolvedSupervised, _LossRules):
    max_completion_tokens: Count
    divergence: Literal["forward", "reverse", "jsd"]
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    estimator: Literal["full", "top_k", "sampled"]
    top_k: Count = 128
    entry_clip: Positive | None = None
    token_clip: Positive | None = None
    teacher: Literal["ema", "frozen", "live"]
    ema_rate: float = Field(gt=0, lt=1)
    teacher_start: Literal["parent", "base"]
    temperature: Positive | Auto
    skip_first_tokens: Annotated[int, Field(ge=0)]
    skip_after_think: bool = False
    mask_clipped_completions: bool | Auto
    over_length: Literal["reject", "drop"]


@dataclass(frozen=True)
class DatasetStatistics:
    """What the automatic values depend on. Lengths in tokens; `answer_tokens` of each usable row, 0 where it has no answer.
    `reasoning`: the answers come without the thoughts that lead to them."""

    rows: int
    answer_tokens: list[int]
    hidden_size: int
    longest_teacher_prompt: int
    context_length: int
    reasoning: bool = False


def automatic_batch_size(rows: int) -> int:
    """8 up to 64 rows, then 32; never more than there are rows."""
    return min(rows, 8 if rows <= 64 else 32)


def automatic_epochs(rows: int, batch_size: int) -> int:
    """The fewest passes that fill 100 batches, at most 50; one pass where it fills them already."""
    return min(50, math.ceil(100 * batch_size / rows))


def automatic_learning_rate(hidden_size: int, lora_rank: int, lora_alpha: int) -> float:
    """5e-4 at hidden size 2048 and alpha = 2 x rank, falling with the square root of the width, in 1e-4 to 1e-3.

    LoRA runs of the literature use 1e-4 to 5e-4 on models of 1B and more; a 135M model (width 576) learns at 1e-3.
    The update of the product BA scales with alpha/rank, so the rate is divided by it.
    """
    scaled = 5e-4 * math.sqrt(2048 / hidden_size) / (lora_alpha / (2 * lora_rank))
    return float(f"{min(1e-3, max(1e-4, scaled)):.2g}")


def common_answer_tokens(answer_tokens: list[int]) -> int:
    """The 95th percentile: rollouts shorter than this would cut off more than one answer in twenty. Lines without an answer
    don't count; without any answer, TOKENS_WITHOUT_AN_ANSWER."""
    known = sorted(count for count in answer_tokens if count)
    return known[math.ceil(0.95 * len(known)) - 1] if known else TOKENS_WITHOUT_AN_ANSWER


def automatic_completion_tokens(statistics: DatasetStatistics) -> int:
    """1.5 times the 95th percentile of the demonstrations' lengths plus 8, at least 16, and what the context leaves; for
    reasoning REASONING_TOKENS more, because a cap below the length of the model's own thoughts would cut off just those."""
    percentile = common_answer_tokens(statistics.answer_tokens)
    room = statistics.context_length - statistics.longest_teacher_prompt
    thoughts = REASONING_TOKENS if statistics.reasoning else 0
    return max(1, min(room, max(16, math.ceil(1.5 * percentile) + 8) + thoughts))


def resolve_supervised(wire: SupervisedHyperparameters, statistics: DatasetStatistics) -> ResolvedSupervised:
    """Every automatic value as a number, for plain SFT."""
    return ResolvedSupervised.model_validate(_given(wire) | _automatic_values(wire, statistics))


def resolve_sdft(wire: SdftHyperparameters, statistics: DatasetStatistics) -> ResolvedSdft:
    """Every automatic value as a number but the two that need the model."""
    tokens = {"max_completion_tokens": automatic_completion_tokens(statistics)} if wire.max_completion_tokens == "auto" else {}
    return ResolvedSdft.model_validate(_given(wire) | _automatic_values(wire, statistics) | tokens)


def _given(wire: SupervisedHyperparameters) -> dict[str, Any]:
    return wire.model_dump(exclude={"learning_rate_multiplier"})  # it is in the learning rate


def _automatic_values(wire: SupervisedHyperparameters, statistics: DatasetStatistics) -> dict[str, float]:
    """The values that both methods settle: given ones too where another one follows from them."""
    batch_size = automatic_batch_size(statistics.rows) if wire.batch_size == "auto" else wire.batch_size
    n_epochs = automatic_epochs(statistics.rows, batch_size) if wire.n_epochs == "auto" else wire.n_epochs
    lora_alpha = min(1024, 2 * wire.lora_rank) if wire.lora_alpha == "auto" else wire.lora_alpha
    learning_rate = automatic_learning_rate(statistics.hidden_size, wire.lora_rank, lora_alpha) if wire.learning_rate == "auto" else wire.learning_rate
    if wire.learning_rate_multiplier != "auto":
        learning_rate *= wire.learning_rate_multiplier
    total_steps = total_steps_of(statistics.rows, batch_size, n_epochs)
    every = max(1, math.ceil(total_steps / 10)) if wire.checkpoint_every_steps == "auto" else wire.checkpoint_every_steps
    return {"n_epochs": n_epochs, "batch_size": batch_size, "learning_rate": learning_rate, "lora_alpha": lora_alpha, "checkpoint_every_steps": every}


def total_steps_of(rows: int, batch_size: int, n_epochs: int) -> int:
    """Optimizer steps of a run: the last batch of an epoch is filled up from the next one, so only the total is rounded up."""
    return math.ceil(rows * n_epochs / batch_size)
