"""Checkpoints: everything a run needs to continue exactly, as safetensors and JSON in one flat directory.

    adapter_config.json adapter_model.safetensors    the student, in PEFT's format
    teacher.safetensors      the teacher's factors (empty for a live teacher and for supervised runs)
    optimizer.safetensors    AdamW's moments and step counts by parameter name
    training_state.json      step, trained tokens, and what was settled at the start
    metrics.json             the StepMetrics of this step
    attestation.json         what a serving plane must reproduce
    manifest.json            SHA-256 of every other file

A sealed directory (see contract/sealed_directory.py): complete or absent. There is no random state in it because none
exists: data order and sampling noise are functions of (seed, step, row).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdft_engine.contract.errors import CheckpointDamaged, ConfigurationError
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.run_directory import Attestation
from sdft_engine.contract.sealed_directory import ATTESTATION_NAME, sealed_directory, verify
from sdft_engine.lora import STUDENT, read_adapter
from sdft_engine.model import LanguageModel
from sdft_engine.teacher import Teacher


@dataclass
class TrainingState:
    """`dtype`, the base's precision, is set when training starts; `temperature` and `mask_clipped_completions` once they are settled
    (sdft only). `barren_steps`: how many in a row taught nothing, see trainer.py. `early` and `recent` are what the
    collapse guard compares. `last_answers`: every row's last rollout by its number, where they serve as drafts of the next."""

    step: int = 0
    trained_tokens: int = 0
    barren_steps: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    temperature: float | None = None
    mask_clipped_completions: bool | None = None
    early: list[dict[str, float]] = field(default_factory=list)
    recent: list[dict[str, float]] = field(default_factory=list)
    last_answers: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.last_answers = {int(row): answer for row, answer in self.last_answers.items()}  # JSON knows names only


def save_checkpoint(
    directory: Path,
    model: LanguageModel,
    base_model: str,
    teacher: Teacher | None,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    metrics: StepMetrics,
    attestation: Attestation,
) -> None:
    """Write a complete checkpoint under `directory`, in place of an older one. Raises DiskFull, leaving nothing behind."""
    with sealed_directory(directory) as temporary:
        model.adapters.save(STUDENT, temporary, base_model)
        save_file(_contiguous(teacher.state() if teacher else {}), temporary / "teacher.safetensors")
        save_file(_contiguous(_optimizer_tensors(model, optimizer)), temporary / "optimizer.safetensors")
        (temporary / "training_state.json").write_text(json.dumps(asdict(state)))
        (temporary / "metrics.json").write_text(metrics.model_dump_json())
        (temporary / ATTESTATION_NAME).write_text(attestation.model_dump_json())


def dtype_of(directory: Path) -> Literal["float32", "bfloat16"] | None:
    """The precision in which the run of a checkpoint is computed, before anything else of it is read. Raises CheckpointDamaged."""
    return _read_state(directory).dtype


def load_checkpoint(directory: Path, model: LanguageModel, teacher: Teacher | None, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Restore student, teacher and optimizer. Raises CheckpointDamaged naming the file that is wrong."""
    verify(directory)
    state = _read_state(directory)
    try:
        _, values = read_adapter(directory)
        model.adapters.assign(STUDENT, values)
        if teacher is not None:
            teacher.restore(load_file(directory / "teacher.safetensors"))
        _restore_optimizer(model, optimizer, load_file(directory / "optimizer.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, ConfigurationError) as error:
        raise CheckpointDamaged(f"checkpoint {directory.name} can't be read: {error}") from error
    return state


def _read_state(directory: Path) -> TrainingState:
    try:
        return TrainingState(**json.loads((directory / "training_state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointDamaged(f"checkpoint {directory.name} can't be read: {error}") from error


def _optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.adapters.parameters(STUDENT).items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return tensors


def _restore_optimizer(model: LanguageModel, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters = model.adapters.parameters(STUDENT)
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        device = "cpu" if part == "step" else model.device
        optimizer.state[parameters[name]][part] = value.to(device)


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
