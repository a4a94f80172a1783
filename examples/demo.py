"""The main job, end to end: `make demo`.

Starts the whole service, teaches a real 135M model invented support facts with SDFT through the stock `openai` client, then
teaches the same facts by supervised fine-tuning (SFT) stopped when it knows as many of the trained questions, and compares
both with the base: trained questions, paraphrases never trained on, general questions (retention).

Exits with 0 where the model learned and did not forget (see `verdict`), with 1 where it did not, with 2 where the demo could
not be run to its end.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from demo_report import Results, durations, print_results, report_of, verdict
from demo_scoring import DATA_DIR, Question, Score, evaluate, read_lines, read_questions
from demo_service import (
    TERMINAL,
    DemoFailed,
    download_adapter,
    follow_job,
    progress_bar,
    running_service,
    save_report,
    timed,
    upload_demonstrations,
    wait_until_servable,
)
from openai import OpenAI, OpenAIError
from rich.console import Console
from rich.progress import Progress

BASE_MODEL = "smollm2-135m-instruct"

SDFT = {
    "teacher_template": "history_twice",
    "hyperparameters": {
        "n_epochs": 28,
        "batch_size": 8,
        "learning_rate": 7e-4,
        "ema_rate": 0.05,
        "anchor_weight": 1.0,
        "temperature": 0.5,
        "max_completion_tokens": 20,
        "mask_clipped_completions": False,
    },
}
"""What a model this small needs: a teacher that stays right when it is sampled (the demonstration shown twice, a low
temperature), something to hold on to where nothing is to be learned (the anchor), and rollouts hardly longer than the
demonstrations, cut-off ones included."""

SFT = {"hyperparameters": {"n_epochs": 28, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every_steps": 6}}
"""The same adapter shape, steps and batch size; a checkpoint every six steps to stop at."""

LEAST_SCORED_TOKEN_ACCURACY = 0.9
"""An SFT checkpoint whose step had fewer of the demonstrations' tokens right is not asked the trained questions: a whole
answer that is right needs nearly all of its tokens, and every scoring takes the cores from the training. The last checkpoint
is always asked."""


def run(client: OpenAI, console: Console, seed: int, data_dir: Path) -> Results:
    """Train and score both arms. `Results.seconds` gets the parts `sdft_training`, `scoring` and `sft`."""
    questions = {name: read_questions(f"{name}.jsonl") for name in ("trained", "paraphrases", "retention")}
    demonstrations = read_lines("demonstrations.jsonl")
    seconds: dict[str, float] = {}
    with progress_bar(console) as progress:
        file_id = upload_demonstrations(client, DATA_DIR / "demonstrations.jsonl")
        sdft_model, seconds["sdft_training"] = train_sdft(client, file_id, seed, progress)
        with timed(seconds, "scoring"):
            sdft = {name: evaluate(client, sdft_model, asked, f"SDFT: {name}", progress) for name, asked in questions.items()}
            base = {name: evaluate(client, BASE_MODEL, asked, f"base: {name}", progress) for name, asked in questions.items()}
            teacher = {
                name: evaluate(client, BASE_MODEL, questions[name], f"base shown the demonstration: {name}", progress, demonstrations)
                for name in ("trained", "paraphrases")
            }
        with timed(seconds, "sft"):
            sft_model, sft_step, trained = train_matched_sft(client, file_id, seed, questions["trained"], sdft["trained"], progress)
        with timed(seconds, "scoring"):
            sft = {"trained": trained} | {name: evaluate(client, sft_model, questions[name], f"SFT: {name}", progress) for name in ("paraphrases", "retention")}
        adapter_path = data_dir / "sdft-adapter.tar.gz"
        size = download_adapter(client, sdft_model, adapter_path)
    console.print(f"Adapter of {sdft_model} downloaded: {adapter_path} ({size / 1e6:.1f} MB)", highlight=False)
    return Results(questions, base, teacher, sdft, sft, sft_step, seconds)


def train_sdft(client: OpenAI, file_id: str, seed: int, progress: Progress) -> tuple[str, float]:
    """Returns the tuned model's id and how many seconds the job ran."""
    method: Any = {"type": "sdft", "sdft": SDFT}
    created = client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file_id, method=method, seed=seed, suffix="demo-sdft")
    ended = follow_job(client, created.id, "SDFT training", progress)
    job = ended.job
    if job.status != "succeeded":
        raise DemoFailed(f"the SDFT job ended as {job.status}: {job.error.message if job.error else 'see its events'}")
    wait_until_servable(client, job.fine_tuned_model, progress)
    return str(job.fine_tuned_model), ended.running_seconds


def train_matched_sft(client: OpenAI, file_id: str, seed: int, trained: list[Question], sdft: Score, progress: Progress) -> tuple[str, int, Score]:
    """Train SFT, ask its checkpoints the trained questions as they appear, and stop at the first that knows as many as SDFT.

    Returns the checkpoint's model id, its step and its score; the best one where none reaches SDFT.
    """
    method: Any = {"type": "supervised", "supervised": SFT}
    created = client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file_id, method=method, seed=seed, suffix="demo-sft")
    scored: dict[int, tuple[str, Score]] = {}

    def reached() -> bool:
        return any(score.right >= sdft.right for _, score in scored.values())

    def score_new(job: Any) -> bool:
        checkpoints = sorted(client.fine_tuning.jobs.checkpoints.list(job.id, limit=100).data, key=lambda checkpoint: checkpoint.step_number)
        for checkpoint in checkpoints:
            if reached():
                break
            step, accuracy = checkpoint.step_number, checkpoint.metrics.train_mean_token_accuracy
            is_last = job.status in TERMINAL and checkpoint is checkpoints[-1]
            if step not in scored and (is_last or accuracy is None or accuracy >= LEAST_SCORED_TOKEN_ACCURACY):
                model = checkpoint.fine_tuned_model_checkpoint
                wait_until_servable(client, model, progress)
                scored[step] = model, evaluate(client, model, trained, f"SFT at step {step}", progress)
        return reached()

    job = follow_job(client, created.id, "SFT training", progress, score_new).job
    score_new(job)
    if job.status == "failed" or not scored:
        raise DemoFailed(f"the SFT job ended as {job.status}: {job.error.message if job.error else 'none of its checkpoints was scored'}")
    best = max(scored, key=lambda step: (min(scored[step][1].right, sdft.right), -step))
    return scored[best][0], best, scored[best][1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("demo-data"), help="where the service keeps its data (default: ./demo-data)")
    parser.add_argument("--seed", type=int, default=1, help="seed of both jobs")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the service is stopped then too
    console = Console()
    data_dir = arguments.data_dir.resolve()
    start = time.monotonic()
    try:
        with running_service(data_dir, console) as client:
            service_start = time.monotonic() - start
            results = run(client, console, arguments.seed, data_dir)
    except (DemoFailed, OpenAIError) as error:
        console.print(f"[red]The demo failed:[/red] {error}", highlight=False)
        return 2
    results.seconds = {"service_start": service_start, **results.seconds, "whole_run": time.monotonic() - start}
    print_results(results, console)
    checks = verdict(results)
    for holds, sentence in checks:
        console.print(f"{'[green]yes[/green]' if holds else '[red]NO[/red] '}  {sentence}", highlight=False)
    save_report(data_dir / "demo-report.json", report_of(results, arguments.seed))
    console.print(f"Time: {durations(results.seconds)}", highlight=False)
    return 0 if all(holds for holds, _ in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
