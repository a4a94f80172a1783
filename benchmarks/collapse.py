"""Which teachers follow their student into nonsense, and whether the collapse guard ends such a run in time.

    .venv/bin/python -m benchmarks.collapse [--rates 1e-3 3e-3 1e-2] [--teachers frozen ema live] [--steps 60] [--seed 1]

The data and settings of learning.py, but for the teacher and the learning rate. Prints, for every run, what the guard watches in its
first and in its last ten steps, where the guard ended it, and how many of the trained and of the general questions the model
answers then. A run that the guard ends for nothing, and one that it lets become useless, would both show here. About two
minutes a run on two cores.
"""

import os

from sdft_engine.contract.thread_pool import TRAINING_THREADS

os.environ.update(TRAINING_THREADS | os.environ)  # before torch is imported

import argparse
import sys
from statistics import fmean

from rich.console import Console
from rich.table import Table

from benchmarks.learning_parts.bench import SDFT, Bench
from sdft_engine.collapse_guard import WINDOW
from sdft_engine.contract.errors import EngineError
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.trainer import training_step, watch_for_collapse

SHOWN = {"entropy": "student_entropy", "divergence": "train_loss", "tokens": "completion_tokens_mean", "cut off": "clipped_ratio"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--teachers", nargs="+", choices=("frozen", "ema", "live"), default=["frozen", "ema", "live"])
    parser.add_argument("--steps", type=int, default=60, help="at most; the schedule is that of a run of this length")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    bench = Bench()
    table = Table("teacher", "rate", *SHOWN, "ended", "trained", "general", title="first ten steps, last ten steps")
    for teacher in options.teachers:
        for rate in options.rates:
            row = run(bench, teacher, rate, options.steps, options.seed)
            print(" | ".join(row), flush=True)
            table.add_row(*row)
    Console(width=130).print(table)
    return 0


def run(bench: Bench, teacher: str, rate: float, steps: int, seed: int) -> list[str]:
    epochs = -(-steps * SDFT["batch_size"] // len(bench.demonstrations))  # type: ignore[operator]
    changed = {"teacher": teacher, "learning_rate": rate, "n_epochs": epochs, "max_completion_tokens": 32}
    measured: list[StepMetrics] = []
    ended = "no"
    with bench.session("sdft", SDFT | changed, seed) as session:
        while session.state.step < min(steps, session.total_steps):
            try:
                measured.append(training_step(session, session.state.step + 1))
                watch_for_collapse(session, measured[-1])
            except EngineError as error:  # the guard's, or a loss that is not finite any more
                ended = f"step {session.state.step}: {error.code}"
                break
        scores = bench.scores(session.model)
    cells = [f"{window(measured[:WINDOW], name):.2f}, {window(measured[-WINDOW:], name):.2f}" for name in SHOWN.values()]
    counts = (scores.trained, scores.general)
    return [teacher, f"{rate:g}", *cells, ended, *(f"{count.right}/{count.n}" for count in counts if count)]


def window(steps: list[StepMetrics], name: str) -> float:
    values = [getattr(metrics, name) for metrics in steps]
    return fmean(value for value in values if value is not None)


if __name__ == "__main__":
    sys.exit(main())
