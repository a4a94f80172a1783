"""The run directory: the whole interface between the worker and the trainer.

    config.json              the resolved TrainingConfig, written by the worker
    train.jsonl              the demonstrations, already validated; validation.jsonl likewise, if given
    retention.jsonl          general questions to measure retention with, instead of the built-in ones, if given
    parent_adapter/          PEFT adapter to continue from, if any
    resume/                  a checkpoint fetched from storage to continue from, if any
    control.json             written by the supervisor (atomically), read by the trainer at every step
    metrics.jsonl            one StepMetrics a line, flushed as written
    events.jsonl             progress for people: {"created_at", "level", "message", "data"?} a line
    rollouts/step_000010.jsonl   sampled completions with per-token divergence
    checkpoints/step_000050/     see sdft_engine.checkpoint; complete once the directory has its final name
    final/                   the trained adapter (PEFT) and attestation.json
    result.json              written last, atomically: TrainingResult
    trainer.log              the trainer's standard output and error

Torch-free. Both sides use these classes; nothing else crosses.
"""

import json
import os
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from sdft_engine.contract.probes import Retention

StopReason = Literal["cancel", "pause", "requeue"]

CHECKPOINT_NAME = re.compile(r"step_[0-9]{6,}")
EXIT_LEASE_EXPIRED = 75
"""The trainer's exit status when it stopped by itself: its lease ran out, or the process that supervised it died."""


class Control(BaseModel):
    """What the supervisor tells the trainer. `lease_deadline` is a moment of `machine_seconds()`, seconds since this machine was started:
    past it the trainer stops by itself, because another attempt may be starting elsewhere. None: no deadline (used without a service).
    `supervisor_pid`: the process whose child the trainer must be; where it no longer is, the supervisor died."""

    lease_deadline: float | None = None
    supervisor_pid: int | None = None
    stop: StopReason | None = None


class AttestationProbe(BaseModel):
    """Log-probabilities (natural) of `token_ids[1:]` under the trained adapter and under the bare base model."""

    token_ids: list[int]
    adapter_logps: list[float]
    base_logps: list[float]


class Attestation(BaseModel):
    """What a serving plane must reproduce before the adapter becomes servable."""

    dtype: str
    probes: list[AttestationProbe]
    base: str | None = None
    """What the base model was made from, with its revision; None where nothing says so."""


class TrainingResult(BaseModel):
    """How an attempt ended. Exactly one of: succeeded, stopped (with the reason), failed (with a typed error)."""

    outcome: Literal["succeeded", "stopped", "failed"]
    stop: StopReason | None = None
    final_step: int = 0
    total_steps: int = 0
    trained_tokens: int = 0
    retention: Retention | None = None
    """As it was at `final_step`, where it was measured there."""
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run directory, and atomic reads and writes of its small files."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def train_path(self) -> Path:
        return self.path / "train.jsonl"

    @property
    def validation_path(self) -> Path:
        return self.path / "validation.jsonl"

    @property
    def retention_path(self) -> Path:
        return self.path / "retention.jsonl"

    @property
    def parent_adapter_dir(self) -> Path:
        return self.path / "parent_adapter"

    @property
    def resume_dir(self) -> Path:
        return self.path / "resume"

    @property
    def control_path(self) -> Path:
        return self.path / "control.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def rollouts_dir(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final_dir(self) -> Path:
        return self.path / "final"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def log_path(self) -> Path:
        return self.path / "trainer.log"

    def checkpoint_dir(self, step: int) -> Path:
        return self.checkpoints_dir / f"step_{step:06d}"

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """Checkpoints under their final names, oldest first."""
        if not self.checkpoints_dir.exists():
            return []
        found = [p for p in self.checkpoints_dir.iterdir() if CHECKPOINT_NAME.fullmatch(p.name)]
        return sorted((int(p.name[5:]), p) for p in found)

    def write_control(self, control: Control) -> None:
        write_atomically(self.control_path, control.model_dump_json().encode())

    def read_control(self) -> Control:
        if not self.control_path.exists():
            return Control()
        return Control.model_validate_json(self.control_path.read_bytes())

    def write_result(self, result: TrainingResult) -> None:
        write_atomically(self.result_path, result.model_dump_json(indent=1).encode())

    def read_result(self) -> TrainingResult | None:
        if not self.result_path.exists():
            return None
        return TrainingResult.model_validate_json(self.result_path.read_bytes())

    def append_event(self, message: str, *, level: Literal["info", "warn", "error"] = "info", data: dict[str, Any] | None = None) -> None:
        line = {"created_at": time.time(), "level": level, "message": message, **({"data": data} if data else {})}
        append_line(self.events_path, json.dumps(line, ensure_ascii=False))


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write, so that a reader sees whole lines or an unfinished last one. What a process that died left
    unfinished stays a line of its own."""
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
        content = (b"\n" if end and file.read(1) != b"\n" else b"") + line.encode() + b"\n"
        while content:  # a nearly full disk takes a part
            content = content[file.write(content) :]


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name, fsync, rename, fsync the directory."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
