"""Checkpoints: everything a run needs to continue exactly, as safetensors and JSON in one flat directory.

    adapter_config.json adapter_model.safetensors    the student, in PEFT's format
    teacher.safetensors      the teacher's factors (empty for a live teacher and for supervised runs)
    optimizer.safetensors    AdamW's moments and step counts by parameter name
    training_state.json      step, trained tokens, and what was settled at the start
    metrics.json             the StepMetrics of this step
    attestation.json         what a serving plane must reproduce
    manifest.json            SHA-256 of every other file

Written to a temporary directory whose files are fsync'd, then renamed: a checkpoint is complete or absent. There is no
random state in it because none exists: data order and sampling noise are functions of (seed, step, row).
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdft_engine.contract.errors import CheckpointDamaged, ConfigurationError, DiskFull
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.run_directory import Attestation, sync_directory
from sdft_engine.lora import read_adapter
from sdft_engine.model import LanguageModel
from sdft_engine.teacher import STUDENT, Teacher

MANIFEST_NAME = "manifest.json"


@dataclass
class TrainingState:
    """`temperature` and `mask_clipped_completions` are set once they are settled (sdft only)."""

    step: int = 0
    trained_tokens: int = 0
    temperature: float | None = None
    mask_clipped_completions: bool | None = None


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
    """Write a complete checkpoint under `directory`. Raises DiskFull, leaving nothing behind."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        model.adapters.save(STUDENT, temporary, base_model)
        save_file(_contiguous(teacher.state() if teacher else {}), temporary / "teacher.safetensors")
        save_file(_contiguous(_optimizer_tensors(model, optimizer)), temporary / "optimizer.safetensors")
        (temporary / "training_state.json").write_text(json.dumps(asdict(state)))
        (temporary / "metrics.json").write_text(metrics.model_dump_json())
        (temporary / "attestation.json").write_text(attestation.model_dump_json())
        seal(temporary)
        if directory.exists():  # a step replayed after a resume
            shutil.rmtree(directory)
        temporary.rename(directory)
        sync_directory(directory.parent)
    except (OSError, SafetensorError) as error:
        raise_if_disk_full(error, directory.name)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(directory: Path, model: LanguageModel, teacher: Teacher | None, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Restore student, teacher and optimizer. Raises CheckpointDamaged naming the file that is wrong."""
    verify(directory)
    try:
        state = TrainingState(**json.loads((directory / "training_state.json").read_text()))
        _, values = read_adapter(directory)
        model.adapters.assign(STUDENT, values)
        if teacher is not None:
            teacher.restore(load_file(directory / "teacher.safetensors"))
        _restore_optimizer(model, optimizer, load_file(directory / "optimizer.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, ConfigurationError) as error:
        raise CheckpointDamaged(f"checkpoint {directory.name} can't be read: {error}") from error
    return state


def seal(directory: Path) -> None:
    """Write the manifest and fsync every file."""
    paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST_NAME)
    manifest = {path.name: _sha256(path) for path in paths}
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(directory)


def verify(directory: Path) -> None:
    """Raises CheckpointDamaged unless every file is there with its hash."""
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_text())
        for name, digest in manifest.items():
            if _sha256(directory / name) != digest:
                raise CheckpointDamaged(f"checkpoint {directory.name}: {name} does not have the hash that was recorded")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointDamaged(f"checkpoint {directory.name} is incomplete: {error}") from error


def raise_if_disk_full(error: Exception, what: str) -> None:
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        raise DiskFull(f"the disk is full: {what} could not be written; free space and start the job again") from error


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
