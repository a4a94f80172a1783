"""The least that a step's arithmetic takes on this machine."""

import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.step_time_parts.shapes import Shape
from sdft_engine.model import choose_device
from sdft_engine.products import frozen_linear

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """Measured: `flops` of a large product a second, in the chosen precision, `bandwidth` in bytes read a second."""

    flops: float
    bandwidth: float


def machine_line(machine: Machine, dtype: str) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{device}, torch {torch.__version__}, {dtype}: large products {machine.flops / GB:.0f} GFLOP/s, reading {machine.bandwidth / GB:.1f} GB/s"


def measure_machine(dtype: torch.dtype, seconds: float = 1.0) -> Machine:
    device = choose_device("auto")
    size = 8192 if device.type == "cuda" else 1536 if dtype == torch.float32 else 768
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    big = torch.randn(1 << (30 if device.type == "cuda" else 26), device=device)
    fastest = min(_median_seconds(product, seconds) for product in (lambda: a @ b, lambda: frozen_linear(a, b)))
    return Machine(2 * size**3 / fastest, big.nbytes / _median_seconds(lambda: big.sum(), seconds))


def _median_seconds(work: Any, seconds: float) -> float:
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def floor_of(shape: Shape, model_dir: Path, runs: dict[str, list[dict[str, Any]]], machine: Machine, rank: int, dtype: str) -> dict[str, float]:
    """Seconds of each phase at the machine's measured speeds, see above."""
    config = AutoConfig.from_pretrained(model_dir)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    outputs = [(hidden, (heads + 2 * config.num_key_value_heads) * head_size), (heads * head_size, hidden), (hidden, 2 * config.intermediate_size)]
    outputs.append((config.intermediate_size, hidden))
    linear = config.num_hidden_layers * sum(a * b for a, b in outputs)
    head = config.vocab_size * hidden
    factors = config.num_hidden_layers * rank * (3 * hidden + (heads + 2 * config.num_key_value_heads) * head_size + heads * head_size + hidden)
    factors += config.num_hidden_layers * rank * (2 * hidden + 3 * config.intermediate_size + hidden)
    attention = 4 * config.num_hidden_layers * heads * head_size  # times the positions that a token sees

    def read(tokens: int) -> float:
        return tokens * 2 * linear + attention * tokens * tokens / 2

    some = next((runs[side][0] for side in ("sdft", "trl") if side in runs), None)
    teacher_prompt = some["tokens"]["teacher_prompt"] / shape.batch if some else shape.prompt
    element = 4 if dtype == "float32" else 2
    one_read = element * (linear + head) / machine.bandwidth
    decoding = sum(
        max(one_read, shape.batch * (2 * (linear + head) + attention * (shape.prompt + step)) / machine.flops) for step in range(1, shape.completion)
    )
    rollout = shape.batch * (read(shape.prompt) + 2 * head) / machine.flops + decoding
    teacher = shape.batch * (read(int(teacher_prompt) + shape.completion) + 2 * head * shape.completion) / machine.flops
    length = shape.prompt + shape.completion
    student = shape.batch * (2 * read(length) + attention * length * length / 2 + 6 * factors * length + 4 * head * shape.completion) / machine.flops
    return {"rollout": rollout, "teacher": teacher, "student": student, "step": rollout + teacher + student}
