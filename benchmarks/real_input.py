"""The main job on real files: a few SDFT steps each, through HTTP, on a service of its own.

    .venv/bin/python benchmarks/real_input.py [FILE...] [--steps N] [--max-completion-tokens 128]

FILE is JSONL of chat demonstrations (default: the demo's). Of a longer file the first 8 x N lines are trained on, in N steps
of 8; the whole of it is validated too, by a job that is cancelled once it is queued. Prints, per file, prompt and completion
lengths, seconds a step by phase and peak memory. Exits non-zero unless every job succeeded with all of its metrics finite and
held at its last step at most 1.2 times the memory that it held at its third.
"""

import argparse
import math
import shutil
import signal
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from demo_service import DemoFailed, follow_job, progress_bar, running_service
from openai import OpenAI, OpenAIError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

BASE_MODEL = "smollm2-135m-instruct"
DEFAULT_FILE = Path(__file__).parents[1] / "examples" / "support_facts" / "demonstrations.jsonl"
BATCH_SIZE = 8
FEWEST_STEPS = 4
"""Memory is compared from the third step on, when every buffer has been needed once."""
MOST_MEMORY_GROWTH = 1.2
PHASES = ("rollout", "teacher", "student")


@dataclass
class Outcome:
    """What came of a file: `rows` are the metrics of its steps, `problems` why it does not pass."""

    file: Path
    lines: int
    trained_lines: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def measure(client: OpenAI, path: Path, steps: int, max_completion_tokens: int, progress: Progress) -> Outcome:
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.strip()]
    trained = lines[: BATCH_SIZE * steps]
    outcome = Outcome(path, len(lines), len(trained))
    hyperparameters = {"n_epochs": 1, "batch_size": BATCH_SIZE, "max_completion_tokens": max_completion_tokens}
    method: Any = {"type": "sdft", "sdft": {"hyperparameters": hyperparameters}}
    try:
        if len(lines) > len(trained):
            outcome.problems += validate_whole(client, path, method, progress)
        file_id = client.files.create(file=(path.name, b"".join(trained)), purpose="fine-tune").id
        created = client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file_id, method=method, seed=1)
        job = follow_job(client, created.id, path.name, progress).job
        page: Any = client.get(f"/fine_tuning/jobs/{job.id}/metrics?max_points=10000", cast_to=object)
    except OpenAIError as error:  # a file that is refused must not keep the others from being measured
        outcome.problems.append(str(error))
        return outcome
    outcome.rows = page["data"]
    if job.status != "succeeded":
        outcome.problems.append(f"the job {job.status}: {job.error.message if job.error else 'see its events'}")
    outcome.problems += problems_of(outcome.rows)
    return outcome


def validate_whole(client: OpenAI, path: Path, method: Any, progress: Progress) -> list[str]:
    """Have every line of the file checked and its tokens counted. Returns what is wrong."""
    with path.open("rb") as file:
        file_id = client.files.create(file=file, purpose="fine-tune").id
    created = client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file_id, method=method, seed=1)
    job = follow_job(client, created.id, f"{path.name}: validating the whole file", progress, lambda job: job.status in ("queued", "running")).job
    return [f"the whole file: {job.error.message if job.error else 'the job failed'}"] if job.status == "failed" else []


def problems_of(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the metrics of a job's steps, in ascending order."""
    found = [f"step {row['step']}: {name} is {value}" for row in rows for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    found += [f"step {row['step']}: no {name}" for row in rows for name in ("train_loss", "gradient_norm") if row.get(name) is None]
    if not rows or len(rows) != rows[-1]["total_steps"]:
        found.append(f"metrics of {len(rows)} steps out of {rows[-1]['total_steps'] if rows else 'all'}")
    if len(rows) < FEWEST_STEPS:
        found.append(f"{len(rows)} steps are too few to see memory grow ({FEWEST_STEPS} are needed)")
    elif rows[-1]["peak_memory_bytes"] > MOST_MEMORY_GROWTH * rows[2]["peak_memory_bytes"]:
        found.append(f"memory grew from {_gib(rows[2])} GiB at step 3 to {_gib(rows[-1])} GiB at step {rows[-1]['step']}")
    return found


def prompt_tokens(row: dict[str, Any], rows_in_step: int) -> float:
    """Mean length of a step's student prompts: what was trained on beside the completions."""
    return float(row["trained_tokens"]) / rows_in_step - float(row["completion_tokens_mean"])


def print_outcomes(outcomes: list[Outcome], console: Console) -> None:
    names = ("prompt tokens", "completion tokens", "clipped", "steps", "s a step", "rollout + teacher + student + rest", "GiB")
    table = Table("", *(outcome.file.name for outcome in outcomes), title="SDFT on real files")
    table.add_row("lines (trained)", *(f"{outcome.lines} ({outcome.trained_lines})" for outcome in outcomes))
    for name, *cells in zip(names, *map(_measured_cells, outcomes), strict=True):
        table.add_row(name, *cells)
    table.add_row("outcome", *("; ".join(outcome.problems) or "ok" for outcome in outcomes))
    console.print(table)
    console.print(
        "Prompt tokens: the student's, mean of a step, smallest to largest; completion tokens likewise. "
        "Clipped: share of all completions that were cut off. GiB: the most that the trainer held until its first and its last step.",
        highlight=False,
    )


def _measured_cells(outcome: Outcome) -> list[str]:
    rows = outcome.rows
    if not rows:
        return ["-"] * 7
    batches = [min(BATCH_SIZE, outcome.trained_lines - BATCH_SIZE * index) for index in range(len(rows))]
    prompts = [prompt_tokens(row, count) for row, count in zip(rows, batches, strict=True)]
    completions = [row["completion_tokens_mean"] for row in rows]
    clipped = sum(row["clipped_ratio"] * count for row, count in zip(rows, batches, strict=True)) / sum(batches)
    phases = [statistics.mean(row[f"{phase}_seconds"] for row in rows) for phase in PHASES]
    step_seconds = statistics.mean(row["step_seconds"] for row in rows)
    return [
        f"{min(prompts):.0f}-{max(prompts):.0f}",
        f"{min(completions):.0f}-{max(completions):.0f}",
        f"{clipped:.0%}",
        f"{len(rows)}/{rows[-1]['total_steps']}",
        f"{step_seconds:.1f}",
        " + ".join(f"{spent:.1f}" for spent in (*phases, step_seconds - sum(phases))),
        f"{_gib(rows[0])} to {_gib(rows[-1])}",
    ]


def _gib(row: dict[str, Any]) -> str:
    return f"{row['peak_memory_bytes'] / 2**30:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", type=Path, nargs="*", default=[DEFAULT_FILE])
    parser.add_argument("--steps", type=int, default=6, help="steps of each job, if the file is long enough (default: 6)")
    parser.add_argument("--max-completion-tokens", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.steps < FEWEST_STEPS:
        parser.error(f"--steps must be at least {FEWEST_STEPS}")
    for path in arguments.files:
        if not path.is_file():
            parser.error(f"{path} is not a file")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the service is stopped then too
    console = Console()
    data_dir = Path(tempfile.mkdtemp(prefix="real-input-"))
    try:
        with running_service(data_dir, console) as client, progress_bar(console) as progress:
            outcomes = [measure(client, path, arguments.steps, arguments.max_completion_tokens, progress) for path in arguments.files]
    except DemoFailed as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 2
    print_outcomes(outcomes, console)
    if any(outcome.problems for outcome in outcomes):
        console.print(f"The service's logs: {data_dir}", highlight=False)
        return 1
    shutil.rmtree(data_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
