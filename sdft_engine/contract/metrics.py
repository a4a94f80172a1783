"""One line of `metrics.jsonl`: what a training step measured. Torch-free; the worker turns lines into rows.

Divergences, KL and entropy are in nats per completion token, averaged over each sequence's loss tokens and then over
sequences. `None` means "not measured in this step", never zero.
"""

from pydantic import BaseModel, ConfigDict


class StepMetrics(BaseModel):
    """Measurements of one optimizer step (1-based)."""

    model_config = ConfigDict(allow_inf_nan=False)

    step: int
    total_steps: int
    epoch: float
    train_loss: float
    train_mean_token_accuracy: float | None = None
    divergence_max: float | None = None
    divergence_first_tokens: float | None = None
    student_entropy: float | None = None
    implicit_reward: float | None = None
    """Mean over rollouts of the sum over loss tokens of log pi(y|x,c) - log pi(y|x) (METHOD: the reward SDFT maximises)."""
    completion_tokens_mean: float | None = None
    clipped_ratio: float | None = None
    eos_ratio: float | None = None
    gradient_norm: float
    adapter_norm: float
    learning_rate: float
    loss_tokens: int
    trained_tokens: int
    """Tokens of this step that were sampled or demonstrated, prompts included; summed up into the job's trained_tokens."""
    step_seconds: float
    rollout_seconds: float | None = None
    teacher_seconds: float | None = None
    student_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
