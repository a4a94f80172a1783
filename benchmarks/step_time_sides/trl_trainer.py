"""One process of TRL's SDFTTrainer for step_time.py, in TRL's own environment: SPEC.json in, one line of JSON out.

Phases are timed by wrapping the trainer's own methods; the student's is what of the training step is neither rollout nor
teacher (forward, divergence, backward).
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer


class Timed(SDFTTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rollout = self.teacher = 0.0
        self.phases: list[tuple[float, float, float]] = []
        self.lengths = {"prompt": 0, "teacher_prompt": 0, "completion": 0}
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.rollout = self.teacher = 0.0
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        whole = time.perf_counter() - start
        self.phases.append((self.rollout, self.teacher, whole - self.rollout - self.teacher))
        return loss

    def sample_rollouts(self, inputs: Any) -> Any:
        start = time.perf_counter()
        batch = super().sample_rollouts(inputs)
        self.rollout += time.perf_counter() - start
        self.lengths["prompt"] = int(batch["prompt_mask"].sum())
        self.lengths["completion"] += int(batch["completion_mask"].sum())
        return batch

    def _prepare_training_batch(self, inputs: Any) -> Any:
        batch = super()._prepare_training_batch(inputs)
        self.lengths["teacher_prompt"] = int(batch["teacher_attention_mask"].sum() - batch["completion_mask"].sum())
        return batch

    def _forward_logits(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        logits = super()._forward_logits(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.teacher += time.perf_counter() - start
        return logits


class StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    dtype = getattr(torch, spec["dtype"])
    rows = zip(spec["questions"], spec["answers"], strict=True)
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": question}], "privileged_context": answer} for question, answer in rows])
    tokenizer = AutoTokenizer.from_pretrained(spec["model_dir"])
    model = AutoModelForCausalLM.from_pretrained(spec["model_dir"], dtype=dtype)
    with tempfile.TemporaryDirectory() as directory:
        config = SDFTConfig(
            output_dir=directory,
            per_device_train_batch_size=spec["batch"],
            gradient_accumulation_steps=1,
            num_generations=1,
            max_steps=spec["steps"],
            learning_rate=1e-4,
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_prompt_length=None,
            max_completion_length=spec["completion"],
            generation_kwargs={"min_new_tokens": spec["completion"]},
            temperature=1.0,
            distillation_mode="full_logits",
            distillation_alpha=0.0,
            teacher_model_kind="ema",
            teacher_update_rate=0.05,
            teacher_prompt_template=spec["template"].replace("{question}", "{prompt}").replace("{demonstration}", "{privileged_context}"),
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=spec["seed"],
        )
        trainer = Timed(
            model=model,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
    step_seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = {f"{name}_seconds": [phases[index] for phases in trainer.phases[1:]] for index, name in enumerate(("rollout", "teacher", "student"))}
    print(json.dumps(measured | {"step_seconds": step_seconds, "peak_bytes": peak, "tokens": trainer.lengths, "loss": trainer.losses}))


if __name__ == "__main__":
    main()
