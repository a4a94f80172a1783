"""Self-distillation fine-tuning (SDFT, arXiv 2601.19897), and plain supervised fine-tuning on the same rails.

Per step, for a batch of prompts x with demonstrations c:

    1. roll out    y ~ student(. | x)                                        sdft_engine.rollouts
    2. score y     student log-probs given x, teacher log-probs given x + c   sdft_engine.step
    3. loss        mean over sequences of the mean over tokens of D(teacher || student)
    4. update      AdamW on the student's LoRA factors
    5. follow      teacher <- (1 - alpha) teacher + alpha student             sdft_engine.teacher

Where this departs from the paper: LoRA instead of full fine-tuning, so teacher and student share one base in memory; the
teacher's average is over the LoRA factors, in float32.
"""

import math
import resource
import time
from collections.abc import Callable
from typing import Literal

import torch

from sdft_engine.anchor import Anchor
from sdft_engine.batching import ScoredText
from sdft_engine.checkpoint import save_checkpoint
from sdft_engine.collapse_guard import CollapseGuard
from sdft_engine.contract.errors import NumericalError
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.run_directory import RunDirectory, StopReason, TrainingResult, append_line
from sdft_engine.divergences import TokenLoss
from sdft_engine.evaluation import mean_token_kl
from sdft_engine.export import write_final
from sdft_engine.lora import STUDENT
from sdft_engine.measurements import Measurements, rollout_measurements, speeds
from sdft_engine.ranks import Ranks
from sdft_engine.retention import MeasurementStopped
from sdft_engine.rollouts import Rollout, write_rollouts
from sdft_engine.schedule import learning_rate_at, rows_of_step
from sdft_engine.session import ALONE, Session, open_session, remember_answers, rollouts_of_step, settle
from sdft_engine.step import Objective, demonstration_loss, sdft_gradient, supervised_gradient
from sdft_engine.teacher import Teacher
from sdft_engine.token_statistics import TokenStatistics, merged
from sdft_engine.vllm_sampler import StoppedWaiting

BARREN_STEPS = 10
"""Steps without a single loss token after which a run is stopped: nothing would ever be learned."""
BARREN_REMEDY = "every rollout was cut off at max_completion_tokens and masked; raise max_completion_tokens, or set mask_clipped_completions to false"
BARREN_PARAM = "method.sdft.hyperparameters.max_completion_tokens"


def train(run: RunDirectory, stop_requested: Callable[[], StopReason | None] = lambda: None, ranks: Ranks = ALONE) -> TrainingResult:
    """Train as `config.json` says, continuing from a checkpoint if the run directory has one.

    `stop_requested` is asked before every step, and before each measurement of the start; of several processes (`ranks`) the first
    decides, and it alone writes. Raises EngineError; writes result.json only through its caller.
    """

    session = open_session(run, ranks)
    session.stop_wanted = lambda: stop_requested() is not None
    if session.sampler is not None:
        session.sampler.stop_wanted = session.stop_wanted
        session.sampler.report = lambda message, level: session.report(message, level=level)
    try:
        return _train(session, lambda: ranks.agree(stop_requested()))
    finally:
        if session.sampler is not None:
            session.sampler.close()


def _train(session: Session, agreed_stop: Callable[[], StopReason | None]) -> TrainingResult:
    run, ranks = session.run, session.ranks
    if (stop := _settled(session, agreed_stop)) is not None:
        return _result(session, "stopped", stop)
    metrics: StepMetrics | None = None
    checkpointed = session.state.step
    while session.state.step < session.total_steps:
        stop = agreed_stop()
        if stop is not None:
            return _stopped(session, stop, metrics if checkpointed < session.state.step else None)
        try:
            metrics = training_step(session, session.state.step + 1)
        except StoppedWaiting:
            continue  # the stop is seen above, and what was trained is kept
        if ranks.is_first:
            append_line(run.metrics_path, metrics.model_dump_json())
        watch_for_collapse(session, metrics)
        if metrics.step % session.config.hyperparameters.checkpoint_every_steps == 0:
            write_checkpoint(session, metrics)
            checkpointed = metrics.step
    if session.teacher and session.state.barren_steps == session.total_steps:
        raise NumericalError(f"no step taught anything: {BARREN_REMEDY}", param=BARREN_PARAM)
    while ranks.agree(_lacks_retention(session)):  # a stop was asked for meanwhile, or the last step was another attempt's
        if (stop := agreed_stop()) is not None:
            return _stopped(session, stop, metrics if checkpointed < session.state.step else None)
        measure_retention(session)
    if ranks.is_first:
        write_final(run.final_dir, session.model, session.config.base_model, session.attestor.attest())
    return _result(session, "succeeded", None)


def _stopped(session: Session, stop: StopReason, unsaved: StepMetrics | None) -> TrainingResult:
    """`unsaved`: metrics of the last step, where no checkpoint holds it."""
    if stop != "cancel" and unsaved is not None:
        write_checkpoint(session, unsaved)
    return _result(session, "stopped", stop)


def _lacks_retention(session: Session) -> bool:
    """Whether the last step's model still is to be asked the general questions."""
    measured_step = session.retention.step if session.retention else None
    return session.retention_probe is not None and session.ranks.is_first and measured_step != session.total_steps


def _settled(session: Session, agreed_stop: Callable[[], StopReason | None]) -> StopReason | None:
    """Settle what is automatic. Returns the stop that kept it from being settled, if any."""
    while True:
        try:
            return settle(session, agreed_stop)
        except StoppedWaiting:  # for the sampler, which is asked in these measurements too
            if (stop := agreed_stop()) is not None:
                return stop


def training_step(session: Session, step: int) -> StepMetrics:
    """One optimizer step, and what it measured."""
    start = time.perf_counter()
    rows = rows_of_step(
        step, session.config.hyperparameters.batch_size, len(session.demonstrations), session.config.seed, session.config.hyperparameters.n_epochs
    )
    session.optimizer.zero_grad(set_to_none=True)
    measured = sdft_step(session, session.teacher, step, rows) if session.teacher else supervised_step(session, rows)
    if session.anchor and measured["loss_tokens"]:
        measured |= anchor_step(session, session.anchor, step)
    session.ranks.sum_gradients(session.model.adapters.parameters(STUDENT).values())
    learning_rate = learning_rate_at(step, session.total_steps, session.config.hyperparameters.learning_rate, session.config.hyperparameters.warmup_ratio)
    parameters = list(session.model.adapters.parameters(STUDENT).values())
    gradient_norm = float(torch.nn.utils.clip_grad_norm_(parameters, session.config.hyperparameters.max_grad_norm))
    if not (math.isfinite(measured["train_loss"]) and math.isfinite(gradient_norm)):
        raise NumericalError(f"the loss or its gradient is not finite at step {step}; lower learning_rate, or set dtype to float32", param="learning_rate")
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate
    if measured["loss_tokens"]:  # else there is no gradient, and AdamW would still decay and drift
        session.optimizer.step()
        if session.teacher:
            session.teacher.follow()
    adapter_norm = math.sqrt(sum(float(p.detach().square().sum()) for p in parameters))
    if not math.isfinite(adapter_norm):
        raise NumericalError(f"the weights are not finite after step {step}; lower learning_rate", param="learning_rate")
    session.state.step = step
    session.state.trained_tokens += measured["trained_tokens"]
    if step == session.total_steps or step % session.config.hyperparameters.checkpoint_every_steps == 0:
        measured |= validate(session)
    seconds = time.perf_counter() - start
    return StepMetrics(
        step=step,
        total_steps=session.total_steps,
        epoch=min(step * session.config.hyperparameters.batch_size / len(session.demonstrations), session.config.hyperparameters.n_epochs),
        gradient_norm=gradient_norm,
        adapter_norm=adapter_norm,
        learning_rate=learning_rate,
        teacher_ema_gap=session.teacher.ema_gap() if session.teacher else None,
        step_seconds=seconds,
        tokens_per_second=measured["trained_tokens"] / seconds,
        peak_memory_bytes=peak_memory_bytes(session.model.device),
        **measured,
        **measure_retention(session),
    )


def sdft_step(session: Session, teacher: Teacher, step: int, rows: list[int]) -> Measurements:
    """Roll out, score under student and teacher, add the gradient."""
    start = time.perf_counter()
    rollouts = rollouts_of_step(session, step, session.ranks.own(rows))
    rollout_seconds = time.perf_counter() - start
    masks = masks_of(session, rollouts)
    statistics = sdft_gradient(session.model, rollouts, masks, teacher.adapter, objective_of(session), session.budget, len(rows), session.prompt_cache)
    shares = session.ranks.collect((rollouts, masks, statistics, rollout_seconds))
    rollouts, masks = (session.ranks.deal_back([share[part] for share in shares]) for part in (0, 1))
    remember_answers(session, rollouts)
    statistics, rollout_seconds = merged([share[2] for share in shares]), max(share[3] for share in shares)
    return rollout_report(session, step, rollouts, masks, statistics) | speeds(rollouts, rollout_seconds, statistics)


def rollout_report(session: Session, step: int, rollouts: list[Rollout], masks: list[list[bool]], statistics: TokenStatistics) -> Measurements:
    """What the whole batch of a step measured, and in some steps the rollouts themselves in a file."""
    measured: Measurements = {}
    if step == 1 or step % session.config.rollout_sample_every_steps == 0:
        if session.ranks.is_first:
            write_rollouts(session.run.rollouts_dir / f"step_{step:06d}.jsonl", session.model, rollouts, statistics)
        texts = [ScoredText(rollout.student_prompt_ids, rollout.completion_ids) for rollout in rollouts]
        measured["kl_from_base"] = mean_token_kl(session.model, texts, STUDENT, texts, None, session.budget.teacher_tokens)
    watch_barren_steps(session, statistics)
    if session.config.reasoning and step == 1:
        warn_of_cut_thoughts(session, rollouts)
    starts = answer_starts(session, rollouts)
    measured |= _shared_measurements(statistics) | rollout_measurements(session.model.chat_format, rollouts, masks, statistics, starts)
    return measured | {"trained_tokens": sum(len(r.student_prompt_ids) + len(r.completion_ids) for r in rollouts)}


def objective_of(session: Session) -> Objective:
    settings = session.config.distillation
    loss = TokenLoss(settings.divergence, settings.jsd_beta, settings.estimator, settings.top_k, settings.entry_clip, settings.token_clip)
    return Objective(loss, session.temperature, session.config.importance)


def answer_starts(session: Session, rollouts: list[Rollout]) -> list[int] | None:
    """Where each answer begins after its thoughts; None where nobody asked."""
    settings = session.config.distillation
    if not (session.config.reasoning or settings.skip_after_think):
        return None
    return [session.model.chat_format.answer_start(rollout.completion_ids) for rollout in rollouts]


def masks_of(session: Session, rollouts: list[Rollout]) -> list[list[bool]]:
    settings = session.config.distillation
    starts = answer_starts(session, rollouts)
    after_think = starts if starts and settings.skip_after_think else [0] * len(rollouts)
    mask_clipped = bool(session.state.mask_clipped_completions)
    return [rollout.loss_mask(settings.skip_first_tokens, mask_clipped, start) for rollout, start in zip(rollouts, after_think, strict=True)]


def supervised_step(session: Session, rows: list[int]) -> Measurements:
    texts = [session.texts[row] for row in rows]
    statistics = supervised_gradient(session.model, session.ranks.own(texts), session.budget, len(rows))
    statistics = merged(session.ranks.collect(statistics))
    return _shared_measurements(statistics) | {"trained_tokens": sum(len(t.prompt_ids) + len(t.completion_ids) for t in texts)}


def anchor_step(session: Session, anchor: Anchor, step: int) -> Measurements:
    statistics = anchor.add_gradient(step, session.ranks, session.budget)
    return {"anchor_kl": statistics.kl, "anchor_seconds": statistics.seconds}


def _shared_measurements(statistics: TokenStatistics) -> Measurements:
    count = statistics.loss_tokens
    return {
        "train_loss": statistics.loss,
        "train_mean_token_accuracy": statistics.correct_tokens / count if count else None,
        "student_entropy": statistics.entropy_sum / count if count else None,
        "loss_tokens": count,
        "student_seconds": statistics.student_seconds,
    }


def watch_for_collapse(session: Session, metrics: StepMetrics) -> None:
    if session.teacher:
        steps = [step for step, _ in session.run.complete_checkpoints()]
        guard = CollapseGuard(session.state.early, session.state.recent)
        guard.observe(metrics, session.teacher.kind, steps)
        session.state.early, session.state.recent = guard.early, guard.recent


def watch_barren_steps(session: Session, statistics: TokenStatistics) -> None:
    """Say so when every rollout was cut off and masked; end a run that never gets a loss token."""
    session.state.barren_steps = 0 if statistics.loss_tokens else session.state.barren_steps + 1
    if session.state.barren_steps == 1:
        session.report(f"Step {session.state.step + 1} taught nothing: {BARREN_REMEDY}", level="warn")
    if session.state.barren_steps >= BARREN_STEPS:
        raise NumericalError(f"{BARREN_STEPS} steps in a row taught nothing: {BARREN_REMEDY}", param=BARREN_PARAM)


def warn_of_cut_thoughts(session: Session, rollouts: list[Rollout]) -> None:
    """A cap below the length of the model's own thoughts would teach it to think less."""
    cut = sum(not rollout.finished for rollout in rollouts)
    if cut * 5 > len(rollouts):
        session.report(
            f"{cut} of {len(rollouts)} first answers were cut off at {session.config.distillation.max_completion_tokens} tokens: the model thinks longer; "
            "raise max_completion_tokens, or it may learn to think less",
            level="warn",
        )


def validate(session: Session) -> Measurements:
    if not session.validation or not session.ranks.is_first:
        return {}
    loss, accuracy = demonstration_loss(session.model, session.validation, STUDENT, session.budget.teacher_tokens)
    return {"valid_loss": loss, "valid_mean_token_accuracy": accuracy}


def measure_retention(session: Session) -> dict[str, float]:
    """Ask the general questions where that is due, and say what was kept. Nothing, where a stop is asked for meanwhile."""
    step, probe, when = session.state.step, session.retention_probe, session.config.retention
    at_checkpoint = when == "checkpoints" and step % session.config.hyperparameters.checkpoint_every_steps == 0
    if probe is None or not session.ranks.is_first or not (step == session.total_steps or at_checkpoint):
        return {}
    start = time.perf_counter()
    session.report(f"Asking {len(probe.questions)} general questions to measure what was kept")
    try:
        session.retention = retention = probe.measure(step, max_padded_tokens=session.budget.teacher_tokens, stop_wanted=session.stop_wanted)
    except MeasurementStopped:
        return {}
    by_probe = ", ".join(f"{name} {score.kept}/{score.base_right}" for name, score in retention.probes.items())
    session.report(
        f"Retention at step {step}: of the {retention.base_right} general questions (of {retention.n}) that the base model answers, "
        f"{retention.kept} are still answered ({by_probe}); KL from base {retention.kl_from_base:.3g} nats a token",
        data={"retention": retention.model_dump()},
    )
    return {
        "retention_kl_from_base": retention.kl_from_base,
        "retention_accuracy": retention.right / retention.n,
        "retention_seconds": time.perf_counter() - start,
    } | ({"retention_kept": retention.kept / retention.base_right} if retention.base_right else {})


def write_checkpoint(session: Session, metrics: StepMetrics) -> None:
    if not session.ranks.is_first:
        return
    directory = session.run.checkpoint_dir(session.state.step)
    attestation = session.attestor.attest()
    save_checkpoint(directory, session.model, session.config.base_model, session.teacher, session.optimizer, session.state, metrics, attestation)


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _result(session: Session, outcome: Literal["succeeded", "stopped"], stop: StopReason | None) -> TrainingResult:
    state = session.state
    retention = session.retention if session.retention and session.retention.step == state.step else None
    return TrainingResult(
        outcome=outcome, stop=stop, final_step=state.step, total_steps=session.total_steps, trained_tokens=state.trained_tokens, retention=retention
    )
