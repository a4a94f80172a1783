"""A run in memory: the model with student and teacher, the data as token ids, the optimizer, and where the run stands."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from sdft_engine.anchor import Anchor
from sdft_engine.attestation import Attestor
from sdft_engine.batching import ScoredText
from sdft_engine.checkpoint import TrainingState, load_checkpoint, read_state
from sdft_engine.contract.config import TrainingConfig, read_config
from sdft_engine.contract.dataset import DatasetLimits, Demonstration, read_dataset, summarise_problems
from sdft_engine.contract.errors import ConfigurationError, ContextExceeded, DatasetError
from sdft_engine.contract.hyperparameters import total_steps_of
from sdft_engine.contract.probes import DEFAULT_PROBES_PATH, Retention, read_probes
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.contract.run_directory import RunDirectory, StopReason
from sdft_engine.contract.teacher_prompts import TeacherView, unshown_hints
from sdft_engine.evaluation import greedy_answers
from sdft_engine.identity import identity_of, require_same_run
from sdft_engine.lora import STUDENT, LoraShape, read_adapter
from sdft_engine.model import LanguageModel, choose_device, choose_dtype, dtype_name, load_base_model
from sdft_engine.prepare_base_model import source_of
from sdft_engine.products import choose_onednn, onednn_is_faster
from sdft_engine.prompt_cache import PromptCache
from sdft_engine.ranks import Ranks
from sdft_engine.retention import RetentionProbe
from sdft_engine.rollouts import Rollout, sample_rollouts
from sdft_engine.schedule import rows_of_step
from sdft_engine.seeds import seed_of
from sdft_engine.step import PassBudget
from sdft_engine.teacher import KEPT_PROBABILITY, Teacher, automatic_temperature
from sdft_engine.vllm_sampler import RemoteSampler

ALONE = Ranks()
LEAST_GREEDY_ACCURACY = 0.5
USELESS_TEACHER = (
    "A teacher that does not say what it is shown teaches little of it: use another teacher_template (history_twice for small models), with {question} in it"
)
PROBED_ROWS = 32
PROBED_ANSWER_TOKENS = 64
MOST_REMEMBERED_TOKENS = 1 << 20
"""Of all rows' last answers, which checkpoints hold."""


@dataclass
class Session:
    """What a run holds in memory. `demonstrations` are in file order; `texts` pair student prompts with their answers."""

    run: RunDirectory
    config: TrainingConfig
    model: LanguageModel
    demonstrations: list[Demonstration]
    texts: list[ScoredText]
    teacher_prompts: list[list[int]]
    validation: list[ScoredText]
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    attestor: Attestor
    ranks: Ranks
    state: TrainingState
    total_steps: int
    budget: PassBudget
    prompt_cache: PromptCache | None = None
    """Of a frozen teacher, over several epochs."""
    sampler: RemoteSampler | None = None
    """None: the trainer samples the rollouts."""
    anchor: Anchor | None = None
    retention_probe: RetentionProbe | None = None
    retention: Retention | None = None
    """The last measurement."""
    stop_wanted: Callable[[], bool] = lambda: False
    """Asked in the middle of what takes as long as several steps. Only the first process's answer counts."""

    @property
    def temperature(self) -> float:
        """Of sampling and scoring, once it is settled."""
        if self.state.temperature is None:
            raise RuntimeError("the temperature is not settled yet")
        return self.state.temperature

    def report(self, message: str, *, level: Literal["info", "warn"] = "info", data: dict[str, Any] | None = None) -> None:
        """An event of the run, written once however many processes train."""
        if self.ranks.is_first:
            self.run.append_event(message, level=level, data=data)


def rollouts_of_step(session: Session, step: int, rows: list[int]) -> list[Rollout]:
    prompts = [text.prompt_ids for text in session.texts]
    longest, tau, seed = session.config.distillation.max_completion_tokens, session.temperature, session.config.seed
    if session.sampler is not None:
        return session.sampler.sample(
            session.model, rows, prompts, session.teacher_prompts, max_completion_tokens=longest, temperature=tau, seed=seed, step=step
        )
    return sample_rollouts(
        session.model,
        rows,
        prompts,
        session.teacher_prompts,
        max_completion_tokens=longest,
        temperature=tau,
        seed=seed,
        step=step,
        drafts=session.state.last_answers,
    )


def remember_answers(session: Session, rollouts: list[Rollout]) -> None:
    """Keep these rows' answers as the drafts of their next ones, unless there will be none, nobody reads drafts, or all would be
    too much to keep."""
    settings = session.config.distillation
    if (
        session.model.fused is not None
        and session.sampler is None
        and settings.n_epochs > 1
        and len(session.texts) * settings.max_completion_tokens <= MOST_REMEMBERED_TOKENS
    ):
        session.state.last_answers |= {rollout.row: rollout.completion_ids for rollout in rollouts}


def open_session(run: RunDirectory, ranks: Ranks = ALONE) -> Session:
    """Read configuration and data, load the model, build student, teacher and optimizer, restore a checkpoint. What is "auto" is
    still to be settled.

    Raises ConfigurationError, DatasetError (no file, or a row that is unreadable or too long), BaseModelError, CheckpointDamaged.
    """
    config = read_config(run.config_path)
    if config.threads:
        torch.set_num_threads(config.threads)
    demonstrations = _read(run.train_path, "training_file")
    checkpoints = run.complete_checkpoints()
    resume_dir = checkpoints[-1][1] if checkpoints else run.resume_dir if run.resume_dir.exists() else None
    begun = read_state(resume_dir) if resume_dir is not None else TrainingState()
    identity = identity_of(run, config)
    if resume_dir is not None:
        require_same_run(begun, identity, config, resume_dir)
    state = _begin(config, begun, ranks)
    state.identity = identity
    model = _base_model(config, state)
    chat_format, settings = model.chat_format, config.hyperparameters
    shape_kept = _add_student(run, config, model)
    teacher = _teacher(config, model) if config.method == "sdft" else None
    optimizer = torch.optim.AdamW(model.adapters.parameters(STUDENT).values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    session = Session(
        run=run,
        config=config,
        model=model,
        demonstrations=demonstrations,
        texts=[_scored_text(chat_format, d, "training_file", needs_answer=teacher is None) for d in demonstrations],
        teacher_prompts=[_teacher_prompt(chat_format, d, config.teacher_view) for d in demonstrations] if teacher else [],
        validation=[
            _scored_text(chat_format, d, "validation_file", needs_answer=True)
            for d in (_read(run.validation_path, "validation_file") if run.validation_path.exists() else [])
        ],
        teacher=teacher,
        optimizer=optimizer,
        attestor=Attestor(model, demonstrations, source_of(config.base_model_dir)),
        ranks=ranks,
        state=state,
        total_steps=total_steps_of(len(demonstrations), settings.batch_size, settings.n_epochs),
        budget=PassBudget(config.tokens_per_pass, 2 * config.tokens_per_pass),
        retention_probe=_retention_probe(run, config, model),
    )
    refuse_too_long_rows(session)
    if teacher is not None and teacher.kind == "frozen" and settings.n_epochs > 1:  # else no prompt is read twice
        session.prompt_cache = PromptCache(session.teacher_prompts)
    if teacher is not None and config.sampler is not None:
        text = session.texts[0]
        session.sampler = RemoteSampler(config.sampler, config.base_model, text.prompt_ids + text.completion_ids, ranks)
    if shape_kept is not None:
        session.report(
            f"Continuing the parent's adapter: its rank {shape_kept.rank} and alpha {shape_kept.alpha} are kept",
            level="warn",
            data={"resolved": {"lora_rank": shape_kept.rank, "lora_alpha": shape_kept.alpha}},
        )
    if resume_dir is not None:
        _resume(session, resume_dir, begun)
    else:
        _announce(session)
    return session


def _begin(config: TrainingConfig, begun: TrainingState, ranks: Ranks) -> TrainingState:
    """What this machine and this day decide for a new run, and what a resumed one (`begun`) keeps of it."""
    return TrainingState(
        date=ranks.agree(begun.date or datetime.now().date().isoformat()),
        dtype=ranks.agree(_dtype(config, begun.dtype)),
        onednn=choose_onednn(ranks.agree(onednn_is_faster() if begun.onednn is None else begun.onednn)),
    )


def _base_model(config: TrainingConfig, state: TrainingState) -> LanguageModel:
    model = load_base_model(config.base_model_dir, device=config.device, dtype=state.dtype or config.dtype)
    model.chat_format = replace(model.chat_format, date=datetime.fromisoformat(state.date) if state.date else None)
    if config.gradient_checkpointing:
        model.recompute_layers()
    return model


def _announce(session: Session) -> None:
    """What starts, and what of the data it does not use."""
    model, settings, ranks = session.model, session.config.hyperparameters, session.ranks
    processes = f" by {ranks.size} processes" if ranks.size > 1 else ""
    session.report(f"Training started on {model.device} in {dtype_name(model.dtype)}{processes}: {session.total_steps} steps of {settings.batch_size}")
    lines = session.demonstrations
    for hint, count in unshown_hints(lines, session.config.teacher_template).items() if session.teacher else ():
        session.report(f"{count} of {len(lines)} lines have a {hint} that teacher_template does not show", level="warn")


def _resume(session: Session, checkpoint: Path, begun: TrainingState) -> None:
    """Restore a checkpoint, and say what could not stay as it was."""
    now = session.state
    session.state = state = load_checkpoint(checkpoint, session.model, session.teacher, session.optimizer)
    state.date, state.dtype, state.onednn = now.date, now.dtype, now.onednn
    if begun.dtype not in (None, now.dtype):
        session.report(f"Training goes on in {now.dtype}, because {begun.dtype} is slow here: not quite the numbers that it began with", level="warn")
    if begun.onednn not in (None, now.onednn):
        session.report("Training goes on without oneDNN, which is missing here: not quite the numbers that it began with", level="warn")
    session.report(f"Training resumed at step {state.step}", data={"step": state.step})


def settle(session: Session, stop_requested: Callable[[], StopReason | None]) -> StopReason | None:
    """Let the base write the anchor's answers, and settle what is "auto", unless a checkpoint held it. Each of these may take as
    long as a step, so `stop_requested` is asked before it. Returns the stop that was found; nothing of this is lost by it, because
    it is all done anew when the run is resumed."""
    state, ranks = session.state, session.ranks
    weight = session.config.hyperparameters.anchor_weight
    if weight:
        if stop := stop_requested():
            return stop
        session.anchor = Anchor(session.model, weight, session.config.seed, session.budget)
    if session.teacher is None or state.temperature is not None:
        return None
    settings = session.config.distillation
    if settings.temperature == "auto" and (stop := stop_requested()):
        return stop
    state.temperature = ranks.agree(settle_temperature(session, session.teacher))
    if settings.mask_clipped_completions == "auto" and (stop := stop_requested()):
        return stop
    state.mask_clipped_completions = ranks.agree(settle_masking(session))
    return None


def _scored_text(chat_format: ChatFormat, demonstration: Demonstration, param: str, *, needs_answer: bool) -> ScoredText:
    if needs_answer and demonstration.answer is None:
        raise DatasetError(f"line {demonstration.line}: it has no answer, which supervised training and validation need", param=param)
    with _naming_line(demonstration, param):
        chat_format.require_shown([*demonstration.prompt, *([demonstration.answer] if demonstration.answer else [])], demonstration.tools)
        return ScoredText(chat_format.student_prompt_ids(demonstration), chat_format.answer_ids(demonstration))


def _teacher_prompt(chat_format: ChatFormat, demonstration: Demonstration, view: TeacherView) -> list[int]:
    with _naming_line(demonstration, "training_file"):
        return chat_format.teacher_prompt_ids(demonstration, view)


@contextlib.contextmanager
def _naming_line(demonstration: Demonstration, param: str) -> Iterator[None]:
    try:
        yield
    except ContextExceeded as error:
        raise DatasetError(f"line {demonstration.line}: {error.message}", param=param) from error
    except ConfigurationError as error:
        said = error.message.removeprefix(f"line {demonstration.line}: ")
        raise DatasetError(f"line {demonstration.line}: {said}", param=param) from error


def refuse_too_long_rows(session: Session) -> None:
    """Raise DatasetError for the first row that the context can't hold: nothing is ever cut off a prompt."""
    context = session.model.chat_format.context_length
    completion = session.config.distillation.max_completion_tokens if session.teacher else 0
    for row, (demonstration, text) in enumerate(zip(session.demonstrations, session.texts, strict=True)):
        prompts = {"prompt": len(text.prompt_ids)} | ({"teacher's prompt": len(session.teacher_prompts[row])} if session.teacher else {})
        longest = max(prompts, key=lambda whose: prompts[whose])
        needed, parts = len(text.prompt_ids) + len(text.completion_ids), f"the prompt has {len(text.prompt_ids):,} and the answer {len(text.completion_ids):,}"
        if prompts[longest] + completion > needed:
            needed, parts = prompts[longest] + completion, f"the {longest} has {prompts[longest]:,} and max_completion_tokens is {completion:,}"
        if needed > context:
            raise DatasetError(f"line {demonstration.line}: it needs {needed:,} tokens, the context holds {context:,}: {parts}", param="training_file")
    for line, text in enumerate(session.validation, start=1):
        if (needed := len(text.prompt_ids) + len(text.completion_ids)) > context:
            raise DatasetError(f"row {line}: it needs {needed:,} tokens, the context holds {context:,}", param="validation_file")


def settle_temperature(session: Session, teacher: Teacher) -> float:
    """The configured temperature, or the one that this teacher's confidence allows; reported as an event."""
    configured = session.config.distillation.temperature
    if configured != "auto":
        return configured
    tau, measured = automatic_temperature(session.model, _teacher_answers(session, teacher.adapter), teacher.adapter, session.budget.teacher_tokens)
    greedy, sampled = measured["greedy_token_accuracy"], measured[f"sampled_token_accuracy_at_{tau:g}"]
    whose = "the answers'" if any(text.completion_ids for text in session.texts) else "its own greedy answers'"
    unsure = sampled < KEPT_PROBABILITY * greedy
    session.report(
        f"Temperature settled at {tau:g}: the teacher reproduces {greedy:.0%} of {whose} tokens greedily, {sampled:.0%} when sampled so"
        + ("; less is kept than at a lower temperature, which is not chosen by itself: set temperature to try one" if unsure else "")
        + (f". {USELESS_TEACHER}" if greedy < LEAST_GREEDY_ACCURACY else "" if unsure else "; nothing needs to be done"),
        level="warn" if greedy < LEAST_GREEDY_ACCURACY else "info",
        data={"resolved": {"temperature": tau}, **measured},
    )
    return tau


def _teacher_answers(session: Session, adapter: str) -> list[ScoredText]:
    """The first teacher prompts with their demonstrations or, where none has one, with what the teacher itself answers greedily."""
    texts = [ScoredText(prompt, text.completion_ids) for prompt, text in zip(session.teacher_prompts, session.texts, strict=True) if text.completion_ids]
    if texts:
        return texts[:PROBED_ROWS]
    prompts = session.teacher_prompts[:PROBED_ROWS]
    answers = greedy_answers(session.model, prompts, adapter, PROBED_ANSWER_TOKENS)
    return [ScoredText(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def settle_masking(session: Session) -> bool:
    """Whether rollouts that are cut off give no loss: as configured, or, automatically, unless most of the first step's are
    cut off. Masked, those would leave next to nothing to learn from, and a model that rambles would never learn to stop."""
    settings = session.config.distillation
    if settings.mask_clipped_completions != "auto":
        return settings.mask_clipped_completions
    rollouts = rollouts_of_step(session, 1, rows_of_step(1, settings.batch_size, len(session.demonstrations), session.config.seed, settings.n_epochs))
    clipped = sum(not rollout.finished for rollout in rollouts)
    masked = clipped <= len(rollouts) / 2
    session.report(
        f"{clipped} of {len(rollouts)} first answers were cut off at {settings.max_completion_tokens} tokens (max_completion_tokens). "
        + _advice_on_cut_answers(clipped, masked, longest=max(len(text.completion_ids) for text in session.texts)),
        data={"resolved": {"mask_clipped_completions": masked}},
    )
    return masked


def _advice_on_cut_answers(clipped: int, masked: bool, longest: int) -> str:
    """`longest`: tokens of the longest demonstration, 0 where there is none."""
    if not clipped:
        return "Answers that are cut off later give no loss; nothing needs to be done"
    means = (
        "Those give no loss, which does no harm while they are few"
        if masked
        else "That is expected of a model that rambles: it learns from cut-off answers too, and with them to stop"
    )
    known = f" (the longest demonstration has {longest} tokens)" if longest else ""
    return f"{means}. Nothing needs to be done unless good answers need to be longer{known}: raise max_completion_tokens then"


def _dtype(config: TrainingConfig, begun_in: Literal["float32", "bfloat16"] | None) -> Literal["float32", "bfloat16"]:
    """As configured or, automatically, the faster one; a run that is resumed keeps what it began in, unless that were bfloat16 on
    a CPU to which it is slow (hundreds of times, on some)."""
    device = choose_device(config.device)
    measured = dtype_name(choose_dtype(config.dtype, device))
    if config.dtype != "auto" or begun_in is None or (begun_in == "bfloat16" and device.type == "cpu"):
        return measured
    return begun_in


def _retention_probe(run: RunDirectory, config: TrainingConfig, model: LanguageModel) -> RetentionProbe | None:
    if config.retention == "off":
        return None
    path = run.retention_path if run.retention_path.exists() else DEFAULT_PROBES_PATH
    return RetentionProbe(model, read_probes(path, model.chat_format.question_length, model.chat_format.context_length))


def _teacher(config: TrainingConfig, model: LanguageModel) -> Teacher:
    settings = config.distillation
    return Teacher(model, settings.teacher, settings.ema_rate, settings.teacher_start)


def _add_student(run: RunDirectory, config: TrainingConfig, model: LanguageModel) -> LoraShape | None:
    """The parent's adapter, or a new one of zero effect. Returns the parent's shape where it is another than was wanted."""
    wanted = LoraShape(config.hyperparameters.lora_rank, config.hyperparameters.lora_alpha)
    if not run.parent_adapter_dir.exists():
        generator = torch.Generator().manual_seed(seed_of(config.seed, "adapter"))
        model.adapters.add(STUDENT, wanted, trainable=True, generator=generator)
        return None
    shape, _ = read_adapter(run.parent_adapter_dir)
    model.adapters.load(STUDENT, run.parent_adapter_dir, trainable=True)
    return shape if shape != wanted else None


def _read(path: Path, param: str) -> list[Demonstration]:
    """Every row, whatever its size: how long a file or a line may be is the service's to say, and it has said so."""
    if not path.is_file():
        raise DatasetError(f"{path} does not exist", param=param)
    with path.open("rb") as lines:
        demonstrations, reader = read_dataset(lines, DatasetLimits(max_line_bytes=sys.maxsize, max_lines=sys.maxsize))
    if reader.problem_count:
        raise DatasetError(f"{path.name}: {summarise_problems(reader.problems, reader.problem_count)}", param=param)
    if not demonstrations:
        raise DatasetError(f"{path.name} has no demonstrations", param=param)
    return demonstrations
