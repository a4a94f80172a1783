"""`scripted_trainer.py RUN_DIR`: obeys the run directory's contract and writes measurements, but trains nothing.

Its steps take LOAD_STEP_SECONDS; each writes a line of metrics and an event that says when it was written. It goes on until it is
told to stop. Imports nothing heavy: what is measured is the service.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from sdft_engine.contract.death_with_parent import die_with_parent
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.run_directory import RunDirectory, TrainingResult, append_line

WATCH_SECONDS = 0.05
MOST_STEPS = 100_000


def main() -> None:
    run, step_seconds = RunDirectory(Path(sys.argv[1])), float(os.environ.get("LOAD_STEP_SECONDS", "1"))
    die_with_parent()
    step, next_step = 0, time.monotonic() + step_seconds
    while (stop := run.read_control().stop) is None:
        if time.monotonic() >= next_step:
            step, next_step = step + 1, next_step + step_seconds
            append_line(run.metrics_path, measured(step, step_seconds).model_dump_json())
            run.append_event(f"Step {step} is done", data={"written_at": time.time()})
        time.sleep(WATCH_SECONDS)
    run.write_result(TrainingResult(outcome="stopped", stop=stop, final_step=step, total_steps=MOST_STEPS))


def measured(step: int, step_seconds: float) -> StepMetrics:
    """As many fields as a step of self-distillation has, so that events are as long as real ones."""
    return StepMetrics(
        step=step,
        total_steps=MOST_STEPS,
        epoch=step / MOST_STEPS,
        train_loss=0.5,
        train_mean_token_accuracy=0.9,
        divergence_max=2.5,
        divergence_first_tokens=0.25,
        student_entropy=1.25,
        implicit_reward=3.5,
        completion_tokens_mean=32,
        clipped_ratio=0,
        eos_ratio=1,
        gradient_norm=1,
        adapter_norm=1,
        teacher_ema_gap=0.001,
        learning_rate=1e-3,
        loss_tokens=256,
        trained_tokens=512,
        step_seconds=step_seconds,
        rollout_seconds=step_seconds / 2,
        teacher_seconds=step_seconds / 4,
        student_seconds=step_seconds / 4,
        tokens_per_second=512 / step_seconds,
        rollout_tokens_per_second=512,
        teacher_tokens_per_second=512,
        student_tokens_per_second=512,
        peak_memory_bytes=1 << 30,
    )


if __name__ == "__main__":
    main()
