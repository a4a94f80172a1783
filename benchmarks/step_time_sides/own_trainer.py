"""One process of this project's trainer for step_time.py: SPEC.json in, one line of JSON out."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from sdft_engine.contract.config import TrainingConfig
from sdft_engine.contract.hyperparameters import ResolvedSdft, ResolvedSupervised
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.session import Session, open_session, settle
from sdft_engine.trainer import training_step

KINDS = {
    "matrix products": ("mkldnn::", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"),
    "LoRA corrections": ("aten::addmm_",),
    "fused attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "softmax": ("aten::_softmax", "aten::_log_softmax"),
    "sums, elementwise, copies": ("aten::",),
}
"""Beginnings of the names of torch's operations; the longest that fits decides. What fits none is Python's or autograd's own time."""


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    common = {
        "n_epochs": spec["steps"] + bool(spec.get("profile")),
        "batch_size": spec["batch"],
        "learning_rate": 1e-4,
        "lora_rank": spec["rank"],
        "lora_alpha": 2 * spec["rank"],
        "warmup_ratio": 0.0,
        "checkpoint_every_steps": 10**6,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    own = {
        "max_completion_tokens": spec["completion"],
        "divergence": "forward",
        "estimator": "full",
        "teacher": "ema",
        "ema_rate": 0.05,
        "teacher_start": "parent",
        "temperature": 1.0,
        "skip_first_tokens": 0,
        "mask_clipped_completions": False,
        "over_length": "reject",
    }
    method = "supervised" if spec["side"] == "sft" else "sdft"
    section: dict[str, Any] = {"supervised": ResolvedSupervised(**common)} if method == "supervised" else {"sdft": ResolvedSdft(**common, **own)}
    config = TrainingConfig(
        method=method,
        base_model="benchmark",
        base_model_dir=Path(spec["model_dir"]),
        seed=spec["seed"],
        dtype=spec["dtype"],
        teacher_template=spec["template"],
        **section,
    )
    with tempfile.TemporaryDirectory() as directory:
        run = RunDirectory(Path(directory))
        run.config_path.write_text(config.model_dump_json())
        rows = zip(spec["questions"], spec["answers"], strict=True)
        lines = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} for question, answer in rows]
        run.train_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        session = open_session(run)
        settle(session, lambda: None)
        session.model.chat_format = dataclasses.replace(session.model.chat_format, eos_token_ids=frozenset())  # every answer to its full length
        metrics = [undrafted_step(session, step) for step in range(1, spec["steps"] + 1)]
        shares = profiled(session, spec["steps"] + 1) if spec.get("profile") else None
    measured: dict[str, Any] = {
        name: [value for each in metrics[1:] if (value := getattr(each, name)) is not None]
        for name in ("step_seconds", "rollout_seconds", "teacher_seconds", "student_seconds")
    }
    tokens = {
        "prompt": sum(len(text.prompt_ids) for text in session.texts),
        "teacher_prompt": sum(map(len, session.teacher_prompts)),
        "completion": sum(int(each.completion_tokens_mean or 0) for each in metrics) * spec["batch"],
    }
    measured |= {"profile": shares} if shares else {}
    print(json.dumps(measured | {"peak_bytes": metrics[-1].peak_memory_bytes, "tokens": tokens, "loss": [each.train_loss for each in metrics]}))


def undrafted_step(session: Session, step: int) -> StepMetrics:
    """Every step has the same prompts here. Real ones may be new, and then no draft is at hand."""
    session.state.last_answers.clear()
    return training_step(session, step)


def profiled(session: Session, step: int) -> dict[str, float]:
    """Shares of one step's time by kind of operation, each operation without those that it calls."""
    cuda = session.model.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        training_step(session, step)
        session.model.wait()
    seconds = dict.fromkeys((*KINDS, "everything else"), 0.0)
    beginnings = sorted(((beginning, kind) for kind, each in KINDS.items() for beginning in each), key=lambda pair: -len(pair[0]))
    for event in profiler.key_averages():
        kind = next((kind for beginning, kind in beginnings if event.key.startswith(beginning)), "everything else")
        seconds[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {kind: value / sum(seconds.values()) for kind, value in seconds.items()}


if __name__ == "__main__":
    main()
