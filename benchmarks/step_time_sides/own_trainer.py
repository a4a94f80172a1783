"""One process of this project's trainer for step_time.py: SPEC.json in, one line of JSON out."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sdft_engine.contract.config import TrainingConfig
from sdft_engine.contract.hyperparameters import ResolvedSdft, ResolvedSupervised
from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.session import open_session, settle
from sdft_engine.trainer import training_step


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    common = {
        "n_epochs": spec["steps"],
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
        metrics = [training_step(session, step) for step in range(1, spec["steps"] + 1)]
    measured: dict[str, Any] = {
        name: [value for each in metrics[1:] if (value := getattr(each, name)) is not None]
        for name in ("step_seconds", "rollout_seconds", "teacher_seconds", "student_seconds")
    }
    tokens = {
        "prompt": sum(len(text.prompt_ids) for text in session.texts),
        "teacher_prompt": sum(map(len, session.teacher_prompts)),
        "completion": sum(int(each.completion_tokens_mean or 0) for each in metrics) * spec["batch"],
    }
    print(json.dumps(measured | {"peak_bytes": metrics[-1].peak_memory_bytes, "tokens": tokens, "loss": [each.train_loss for each in metrics]}))


if __name__ == "__main__":
    main()
