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
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdft_engine.contract.errors import CheckpointDamaged, ConfigurationError
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.run_directory import Attestation
from sdft_engine.contract.sealed_directory import ATTESTATION_NAME, sealed_directory, verify
from sdft_engine.lora import STUDENT, read_adapter
from sdft_engine.model import LanguageModel
from sdft_engine.teacher import Teacher

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """Set when training starts: `date`, which some chat templates show; `dtype`, the base's precision; `onednn`, whether its products
    go through oneDNN; `identity`, see identity.py. Once settled (sdft only): `temperature`, `mask_clipped_completions`.
    `barren_steps`: how many in a row taught nothing, see trainer.py. `early` and `recent` are what the collapse guard compares.
    `last_answers`: every row's last rollout by its number, where they serve as drafts of the next."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]  # pydantic's, for a file that is read

    step: Annotated[int, Field(ge=0)] = 0
    trained_tokens: Annotated[int, Field(ge=0)] = 0
    barren_steps: int = 0
    date: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    onednn: bool | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    temperature: float | None = None
    mask_clipped_completions: bool | None = None
    early: list[dict[str, float]] = field(default_factory=list)
    recent: list[dict[str, float]] = field(default_factory=list)
    last_answers: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.last_answers = {int(row): answer for row, answer in self.last_answers.items()}  # JSON knows names only


STATE_FORM = TypeAdapter(TrainingState)


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


def load_checkpoint(directory: Path, model: LanguageModel, teacher: Teacher | None, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Restore student, teacher and optimizer. Raises CheckpointDamaged naming the file that is wrong, and ConfigurationError where
    the student has another shape than the run says."""
    state = read_state(directory)
    try:
        shape, values = read_adapter(directory)
        wanted = model.adapters.shapes[STUDENT]
        for name, now, before in (("lora_rank", wanted.rank, shape.rank), ("lora_alpha", wanted.alpha, shape.alpha)):
            if now != before:
                raise AnotherShape(f"{name} is {now} now, and was {before} when {directory.name} was written", param=name)
        model.adapters.assign(STUDENT, values)
        if teacher is not None:
            teacher.restore(load_file(directory / "teacher.safetensors"))
        _restore_optimizer(model, optimizer, load_file(directory / "optimizer.safetensors"))
    except AnotherShape:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, ConfigurationError) as error:
        raise CheckpointDamaged(f"checkpoint {directory.name} can't be read: {error}") from error
    return state


class AnotherShape(ConfigurationError):
    """The checkpoint is whole, and of another adapter."""


def read_state(directory: Path) -> TrainingState:
    """Where a run stood. Raises CheckpointDamaged unless every file of the checkpoint is as it was written."""
    verify(directory)
    try:
        state = STATE_FORM.validate_json((directory / "training_state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointDamaged(f"checkpoint {directory.name} can't be read: {error}") from error
    named = directory.name.removeprefix("step_")
    if named != directory.name and int(named) != state.step:
        raise CheckpointDamaged(f"checkpoint {directory.name} is of step {state.step}")
    return state


def _optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.adapters.parameters(STUDENT).items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return tensors


def _restore_optimizer(model: LanguageModel, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Of every factor or, before the first update, of none."""
    parameters = model.adapters.parameters(STUDENT)
    expected = {f"{name}/{part}": () if part == "step" else parameter.shape for name, parameter in parameters.items() for part in ADAMW_STATE}
    if tensors and {key: tuple(value.shape) for key, value in tensors.items()} != {key: tuple(shape) for key, shape in expected.items()}:
        raise ValueError("optimizer.safetensors does not fit the adapter")
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        device = "cpu" if part == "step" else model.device
        optimizer.state[parameters[name]][part] = value.to(device)


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
