"""What a run is, noted in its checkpoints: continuing with another method, other data or other hyperparameters would be
neither the old run nor a new one, and nothing in the numbers would say so."""

from pathlib import Path
from typing import Any

from sdft_engine.checkpoint import TrainingState
from sdft_engine.contract.config import TrainingConfig
from sdft_engine.contract.errors import BaseModelError, ConfigurationError
from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.contract.sealed_directory import file_sha256
from sdft_engine.prepare_base_model import source_of

ELSEWHERE = {"temperature", "mask_clipped_completions", "lora_rank", "lora_alpha"}
"""May be "auto" or the parent's; what they became is part of the checkpoint, and is compared there."""
BASE_MODEL = "base_model"
"""Two of one id and shape are told apart by nothing else than what they were made from, where that is known."""
REMEDY = "put it back, or remove checkpoints/ (and resume/) to begin anew"

Identity = dict[str, Any]
"""JSON values by name."""


def identity_of(run: RunDirectory, config: TrainingConfig) -> Identity:
    """What decides the weights, but for the machine."""
    section = config.hyperparameters.model_dump(mode="json", exclude=ELSEWHERE)
    view = {"method": config.method, "seed": config.seed, "teacher_template": config.teacher_template, "reasoning": config.reasoning}
    return view | section | {"train.jsonl": file_sha256(run.train_path), BASE_MODEL: source_of(config.base_model_dir)}


def require_same_run(state: TrainingState, now: Identity, config: TrainingConfig, checkpoint: Path) -> None:
    """Raise ConfigurationError naming the first thing that has changed since the checkpoint, BaseModelError where that is the base."""
    base, base_before = now.get(BASE_MODEL), state.identity.get(BASE_MODEL)
    if None not in (base, base_before) and base != base_before:
        raise BaseModelError(f"{config.base_model} is made from {base} now, and was made from {base_before} when {checkpoint.name} was written", param="model")
    for name, before in state.identity.items():
        if name == "train.jsonl" and now.get(name) != before:
            raise ConfigurationError(f"train.jsonl is not the one that {checkpoint.name} was trained on: {REMEDY}", param="training_file")
        if name != BASE_MODEL and now.get(name) != before:
            raise _changed(name, now.get(name), before, checkpoint)
    if config.method == "sdft":
        settled = {"temperature": state.temperature, "mask_clipped_completions": state.mask_clipped_completions}
        for name, before in settled.items():
            wanted = getattr(config.distillation, name)
            if before is not None and wanted not in ("auto", before):
                raise _changed(name, wanted, before, checkpoint)


def _changed(name: str, now: Any, before: Any, checkpoint: Path) -> ConfigurationError:
    return ConfigurationError(f"{name} is {now!r} now, and was {before!r} when {checkpoint.name} was written: {REMEDY}", param=name)
