"""The main job, end to end: `make demo`.

Starts the whole service, teaches a real 135M model thirty invented support facts (sixty demonstrations) with SDFT through
the stock `openai` client, then teaches the same facts by supervised fine-tuning (SFT) stopped when it knows as many of the
trained questions, and compares both with the base: trained questions, paraphrases never trained on, general questions
(retention).

Exits non-zero unless the model learned and did not forget: see `verdict`.
"""

import argparse
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_scoring import DATA_DIR, Question, Score, evaluate, read_lines, read_questions, wilson_interval
from demo_service import DemoFailed, download_adapter, follow_job, progress_bar, running_service, save_report, upload_demonstrations
from openai import OpenAI
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

BASE_MODEL = "smollm2-135m-instruct"

SDFT = {
    "teacher_template": "history_twice",
    "hyperparameters": {
        "n_epochs": 17,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "temperature": 0.5,
        "max_completion_tokens": 20,
        "mask_clipped_completions": False,
    },
}
"""What a model this small needs: a teacher that stays right when it is sampled (the demonstration shown twice, a low
temperature), and rollouts hardly longer than the demonstrations, cut-off ones included."""

SFT = {"hyperparameters": {"n_epochs": 17, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every_steps": 6}}
"""The same adapter shape, steps, batch size and learning rate; a checkpoint every six steps to stop at."""

MOST_BASE_PARAPHRASES = 0.10
LEAST_SDFT_PARAPHRASES = 0.70
LEAST_RETENTION = 0.85


@dataclass
class Results:
    """Scores by set ("trained", "paraphrases", "retention") of each arm."""

    base: dict[str, Score]
    teacher: dict[str, Score]
    sdft: dict[str, Score]
    sft: dict[str, Score]
    sft_step: int

    def retention(self, arm: dict[str, Score]) -> float:
        """Share of the base's accuracy on the general questions; the base counts as 1."""
        return arm["retention"].accuracy / self.base["retention"].accuracy


def run(client: OpenAI, console: Console, seed: int, data_dir: Path) -> Results:
    questions = {name: read_questions(f"{name}.jsonl") for name in ("trained", "paraphrases", "retention")}
    demonstrations = read_lines("demonstrations.jsonl")
    with progress_bar(console) as progress:
        file_id = upload_demonstrations(client, DATA_DIR / "demonstrations.jsonl")
        sdft_model = train_sdft(client, file_id, seed, progress)
        sdft = {name: evaluate(client, sdft_model, asked, f"SDFT: {name}", progress) for name, asked in questions.items()}
        base = {name: evaluate(client, BASE_MODEL, asked, f"base: {name}", progress) for name, asked in questions.items()}
        teacher = {
            name: evaluate(client, BASE_MODEL, questions[name], f"base shown the demonstration: {name}", progress, demonstrations)
            for name in ("trained", "paraphrases")
        }
        sft_model, sft_step, trained = train_matched_sft(client, file_id, seed, questions["trained"], sdft["trained"], progress)
        sft = {"trained": trained} | {name: evaluate(client, sft_model, questions[name], f"SFT: {name}", progress) for name in ("paraphrases", "retention")}
        adapter_path = data_dir / "sdft-adapter.tar.gz"
        size = download_adapter(client, sdft_model, adapter_path)
    console.print(f"Adapter of {sdft_model} downloaded: {adapter_path} ({size / 1e6:.1f} MB)", highlight=False)
    return Results(base, teacher, sdft, sft, sft_step)


def train_sdft(client: OpenAI, file_id: str, seed: int, progress: Progress) -> str:
    method: Any = {"type": "sdft", "sdft": SDFT}
    job = client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file_id, method=method, seed=seed, suffix="demo-sdft")
    job = follow_job(client, job.id, "SDFT training", progress)
    if job.status != "succeeded":
        raise DemoFailed(f"the SDFT job ended as {job.status}: {job.error.message if job.error else 'see its events'}")
    wait_until_servable(client, job.fine_tuned_model)
    return str(job.fine_tuned_model)


def train_matched_sft(client: OpenAI, file_id: str, seed: int, trained: list[Question], sdft: Score, progress: Progress) -> tuple[str, int, Score]:
    """Train SFT and ask every checkpoint the trained questions; stop at the first that knows as many as SDFT does.

    Returns the checkpoint's model id, its step and its score; the best one where none reaches SDFT.
    """
    method: Any = {"type": "supervised", "supervised": SFT}
    job = client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file_id, method=method, seed=seed, suffix="demo-sft")
    scored: dict[int, tuple[str, Score]] = {}

    def matched() -> bool:
        for checkpoint in reversed(client.fine_tuning.jobs.checkpoints.list(job.id, limit=100).data):
            if checkpoint.step_number not in scored and not any(score.right >= sdft.right for _, score in scored.values()):
                model = checkpoint.fine_tuned_model_checkpoint
                wait_until_servable(client, model)
                scored[checkpoint.step_number] = model, evaluate(client, model, trained, f"SFT at step {checkpoint.step_number}", progress)
        return any(score.right >= sdft.right for _, score in scored.values())

    ended = follow_job(client, job.id, "SFT training", progress, matched)
    matched()
    if ended.status == "failed" or not scored:
        raise DemoFailed(f"the SFT job ended as {ended.status} without a checkpoint")
    best = max(scored, key=lambda step: (min(scored[step][1].right, sdft.right), -step))
    return scored[best][0], best, scored[best][1]


def wait_until_servable(client: OpenAI, model: str, timeout_seconds: float = 120) -> None:
    deadline = time.monotonic() + timeout_seconds
    while (client.models.retrieve(model).model_extra or {}).get("status") != "servable":
        if time.monotonic() > deadline:
            raise DemoFailed(f"{model} did not become servable: its log-probabilities on the inference server could not be verified; see the job's events")
        time.sleep(0.5)


def print_results(results: Results, console: Console) -> None:
    table = Table(title="Share answered, with 95% intervals (Wilson)")
    for heading in ("", "trained questions", "paraphrases", "general questions", "retention"):
        table.add_column(heading, justify="left" if not heading else "right")
    arms = {
        "base": results.base,
        "base shown the demonstration": results.teacher,
        f"SFT (stopped at step {results.sft_step})": results.sft,
        "SDFT": results.sdft,
    }
    for name, arm in arms.items():
        cells = [_cell(arm[key]) if key in arm else "-" for key in ("trained", "paraphrases", "retention")]
        table.add_row(name, *cells, f"{results.retention(arm):.0%}" if "retention" in arm else "-")
    console.print(table)
    answers = Table(title="Side by side", show_lines=True)
    for heading in ("question", "base", "SFT", "SDFT"):
        answers.add_column(heading, overflow="fold")
    for name, rows in (("paraphrases", (0, 2, 4)), ("retention", (0, 25, 31))):
        for row in rows:
            question = read_questions(f"{name}.jsonl")[row].text
            answers.add_row(question, *(arm[name].answers[row].strip() for arm in (results.base, results.sft, results.sdft)))
    console.print(answers)

    if results.sft["trained"].right < results.sdft["trained"].right:
        console.print("SFT never knew as many of the trained questions as SDFT; its best checkpoint is shown, so the comparison is not matched.")


def _cell(score: Score) -> str:
    low, high = wilson_interval(score.right, score.n)
    return f"{score.accuracy:.0%} [{low:.0%}-{high:.0%}] n={score.n}"


def verdict(results: Results) -> list[tuple[bool, str]]:
    """What must hold, and whether it does."""
    sdft, sft = results.retention(results.sdft), results.retention(results.sft)
    learned = results.sdft["paraphrases"].accuracy
    known = results.base["paraphrases"].accuracy
    return [
        (known <= MOST_BASE_PARAPHRASES, f"the base answers {known:.0%} of the paraphrases (at most {MOST_BASE_PARAPHRASES:.0%})"),
        (learned >= LEAST_SDFT_PARAPHRASES, f"SDFT answers {learned:.0%} of the paraphrases (at least {LEAST_SDFT_PARAPHRASES:.0%})"),
        (sdft >= LEAST_RETENTION, f"SDFT keeps {sdft:.0%} of the base's general knowledge (at least {LEAST_RETENTION:.0%})"),
        (sdft > sft, f"SDFT keeps more than SFT ({sdft:.0%} against {sft:.0%})"),
    ]


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
            results = run(client, console, arguments.seed, data_dir)
    except DemoFailed as error:
        console.print(f"[red]The demo failed:[/red] {error}", highlight=False)
        return 2
    print_results(results, console)
    checks = verdict(results)
    for holds, sentence in checks:
        console.print(f"{'[green]yes[/green]' if holds else '[red]NO[/red] '}  {sentence}", highlight=False)
    arms = {name: {key: score.right for key, score in arm.items()} for name, arm in (("base", results.base), ("sft", results.sft), ("sdft", results.sdft))}
    save_report(
        data_dir / "demo-report.json",
        {
            "seed": arguments.seed,
            "sft_step": results.sft_step,
            "n": {key: score.n for key, score in results.sdft.items()},
            "right": arms,
            "seconds": time.monotonic() - start,
        },
    )
    console.print(f"Whole run: {(time.monotonic() - start) / 60:.1f} minutes")
    return 0 if all(holds for holds, _ in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
