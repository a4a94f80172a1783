"""One line of `metrics.jsonl`: what a training step measured. Torch-free; the worker turns lines into rows.

Loss tokens are the completion tokens that the loss counts (in SDFT all but the skipped first ones and those of masked
rollouts; in SFT every token of the demonstrations). Divergences, entropy and losses are in nats. `None` means "not measured
in this step", never zero.
"""

from pydantic import BaseModel, ConfigDict


class StepMetrics(BaseModel):
    """Measurements of one optimizer step (1-based)."""

    model_config = ConfigDict(allow_inf_nan=False)

    step: int
    total_steps: int
    epoch: float
    """Passes over the demonstrations so far, this step included."""

    train_loss: float
    """What is minimised. SDFT: the divergence from teacher to student, SFT: cross-entropy; mean over a sequence's loss tokens,
    then over the sequences."""
    train_mean_token_accuracy: float | None = None
    """Share of the loss tokens at which the student's likeliest token is the teacher's likeliest (SDFT), the demonstration's (SFT)."""
    divergence_max: float | None = None
    """The largest divergence of a single loss token."""
    divergence_first_tokens: float | None = None
    """Mean divergence of the tokens that `skip_first_tokens` leaves out of the loss: where a teacher's habits would show."""
    student_entropy: float | None = None
    """Mean over the loss tokens of the student's entropy, at the sampling temperature."""
    implicit_reward: float | None = None
    """Mean over rollouts of the sum over loss tokens of log pi(y|x,c) - log pi(y|x) (the reward that SDFT maximises)."""
    kl_from_base: float | None = None
    """Mean over the rollouts' tokens of KL(student || base), without a temperature; in steps whose rollouts are written down."""
    teacher_opening_ratio: float | None = None
    """Share of the rollouts that open as only someone would who was shown something ("Based on the example …")."""
    importance_ratio: float | None = None
    """Mean over the loss tokens of pi_trainer / pi_sampler, where another program sampled the rollouts."""
    top_k_mass: float | None = None
    """Mean over the loss tokens of the probability that the estimator `top_k` looks at; the rest is its tail."""
    completion_tokens_mean: float | None = None
    """Mean length of the rollouts, the end-of-sequence token included."""
    thinking_tokens_mean: float | None = None
    """Mean length of the rollouts' thoughts, up to and including the closing think tag; where `reasoning` or
    `skip_after_think` asks for it."""
    clipped_ratio: float | None = None
    """Share of the rollouts that were cut off at max_completion_tokens."""
    eos_ratio: float | None = None
    """Share of the rollouts that ended by themselves."""

    anchor_kl: float | None = None
    """Mean over the tokens of the base's own answers to the step's general prompts of KL(base || student), where `anchor_weight`
    holds on to them; not part of `train_loss`."""

    gradient_norm: float
    """L2 norm over all of the student's factors, before clipping."""
    adapter_norm: float
    """L2 norm of the student's factors after the step."""
    teacher_ema_gap: float | None = None
    """How far the product of the averaged factors is from the same average of their products, relative to the latter, in one
    layer: what an `ema` teacher is short of the average of the students."""
    learning_rate: float
    """Of this step."""

    loss_tokens: int
    trained_tokens: int
    """Tokens of this step alone that were sampled or demonstrated, prompts included; a job's trained_tokens is their sum."""
    step_seconds: float
    rollout_seconds: float | None = None
    teacher_seconds: float | None = None
    student_seconds: float
    anchor_seconds: float | None = None
    """Phases of step_seconds; the optimizer and validation make up the rest."""
    tokens_per_second: float
    """trained_tokens / step_seconds."""
    rollout_tokens_per_second: float | None = None
    teacher_tokens_per_second: float | None = None
    student_tokens_per_second: float | None = None
    """Sampled tokens over rollout_seconds; tokens read, prompts included, over teacher_seconds and student_seconds."""
    peak_memory_bytes: int
    """The most this process has held so far: resident memory, or CUDA memory where it trains on a GPU."""

    retention_kl_from_base: float | None = None
    """Mean over the tokens of the base's own answers to general questions of KL(base || student)."""
    retention_accuracy: float | None = None
    """Share of the general questions that the student answers."""
    retention_kept: float | None = None
    """Of those that the base answers, the share that the student still answers."""
    retention_seconds: float | None = None
    """What asking them took; not part of step_seconds."""

    valid_loss: float | None = None
    """Mean cross-entropy of the validation file's demonstration tokens, without a teacher."""
    valid_mean_token_accuracy: float | None = None
    """Share of those tokens that are the student's likeliest."""
