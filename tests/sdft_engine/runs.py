"""Run directories on the tiny model, as the worker would prepare them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sdft_engine.contract.config import TrainingConfig
from sdft_engine.contract.hyperparameters import ResolvedSdft, ResolvedSupervised
from sdft_engine.contract.run_directory import RunDirectory, StopReason
from sdft_engine.lora import LoraShape
from sdft_engine.model import load_base_model
from tests.sdft_engine.plain import add_adapter

COLOURS = ("red", "blue", "green", "white", "brown", "grey", "black", "pink")
TIMINGS = {"step_seconds", "rollout_seconds", "teacher_seconds", "student_seconds", "anchor_seconds", "tokens_per_second", "peak_memory_bytes"} | {
    f"{phase}_tokens_per_second" for phase in ("rollout", "teacher", "student")
}

SUPERVISED = ResolvedSupervised(
    n_epochs=4, batch_size=3, learning_rate=1e-2, lora_rank=4, lora_alpha=8, warmup_ratio=0.1, checkpoint_every_steps=4, weight_decay=0.0, max_grad_norm=1.0
)
SDFT = ResolvedSdft(
    **SUPERVISED.model_dump(),
    max_completion_tokens=8,
    divergence="forward",
    estimator="full",
    teacher="ema",
    ema_rate=0.05,
    teacher_start="parent",
    temperature=1.0,
    skip_first_tokens=1,
    mask_clipped_completions=False,
    over_length="reject",
)
"""With 6 rows: 8 steps."""


def example(number: int) -> dict[str, Any]:
    """One line: a question about a lamp, and its colour."""
    messages = [
        {"role": "user", "content": f"What is the colour of lamp {number}?"},
        {"role": "assistant", "content": f"The lamp is {COLOURS[number % len(COLOURS)]}."},
    ]
    return {"messages": messages}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(
    path: Path,
    model_dir: Path,
    method: Literal["sdft", "supervised"] = "sdft",
    *,
    rows: int = 6,
    validation_rows: int = 0,
    config: dict[str, Any] | None = None,
    **hyperparameters: Any,
) -> RunDirectory:
    """A run directory that is ready to train, in float32 on the CPU. `hyperparameters` replace those above."""
    path.mkdir(parents=True)
    run = RunDirectory(path)
    resolved = (SDFT if method == "sdft" else SUPERVISED).model_copy(update=hyperparameters)
    options = {"base_model": "tiny-llama", "base_model_dir": model_dir, "seed": 17, "device": "cpu", "dtype": "float32", "threads": 1}
    whole = TrainingConfig(method=method, **{method: resolved}, **(options | (config or {})))
    run.config_path.write_text(whole.model_dump_json())
    write_lines(run.train_path, [example(number) for number in range(rows)])
    if validation_rows:
        write_lines(run.validation_path, [example(100 + number) for number in range(validation_rows)])
    return run


def make_parent(run: RunDirectory, model_dir: Path, shape: LoraShape, strength: float = 0.05) -> dict[str, Tensor]:
    """An adapter to continue from; returns its factors."""
    model = load_base_model(model_dir, device="cpu", dtype="float32")
    factors = add_adapter(model, "parent", seed=5, shape=shape, strength=strength)
    run.parent_adapter_dir.mkdir()
    model.adapters.save("parent", run.parent_adapter_dir, "tiny-llama")
    return {name: value.detach() for name, value in factors.items()}


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, events.jsonl or a rollouts file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(run: RunDirectory) -> list[dict[str, Any]]:
    """The metrics but for what depends on the machine's speed; of a step done twice, the last."""
    by_step = {record["step"]: {key: value for key, value in record.items() if key not in TIMINGS} for record in records(run.metrics_path)}
    return [by_step[step] for step in sorted(by_step)]


def messages_of(run: RunDirectory, level: str | None = None) -> list[str]:
    return [event["message"] for event in records(run.events_path) if level in (None, event["level"])]


def steps_done(run: RunDirectory) -> int:
    return len(records(run.metrics_path)) if run.metrics_path.exists() else 0


def stop_after(run: RunDirectory, steps: int, reason: StopReason) -> Callable[[], StopReason | None]:
    """A `stop_requested` that asks for the stop once so many steps are done."""
    return lambda: reason if steps_done(run) >= steps else None


def content_of(directory: Path, *, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name not in without}
