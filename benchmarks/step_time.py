"""Seconds and memory of a training step: SDFT here, SDFT in TRL, SFT here, and the least that the arithmetic takes.

    make trl; .venv/bin/python -m benchmarks.step_time [SHAPE...] [--rounds 3] [--steps 4] [--dtype float32] [--out step-times]

On a CPU the default shapes are those of a 135M model, on a GPU those of 1.5B and 7B parameters with random weights (give
--dtype bfloat16 there).

Every measurement is a process of its own, and the sides take turns (A B C A B C ...); a process's first step is left out.
Both trainers get the same model, prompts, teacher prompts, LoRA layers, batch, learning rate and precision, an EMA teacher and
the exact forward divergence over the whole vocabulary, and every answer is sampled to the same length. "Peak memory" is the
most that the process held, loading included.

The floor counts, for every row by itself, the multiplications of rollout, teacher, and student forward and backward at the
speed of a large matrix product, by the fastest kernel that torch has; a decoding step counts as reading all weights at the measured bandwidth where that
takes longer. A trainer that computes a common beginning of its rows once can be faster than this floor.

A shape that is done is written to step_time.json and step_time.md in --out at once, and replaces what they held of the same
shape, precision and rank; the others stay. On two cores three rounds of all shapes take about an hour.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.step_time_parts.floor import floor_of, machine_line, measure_machine
from benchmarks.step_time_parts.report import print_shape, write
from benchmarks.step_time_parts.shapes import GPU_SHAPES, SHAPES, model_of, texts_of
from sdft_engine.contract.thread_pool import TRAINING_THREADS

ROOT = Path(__file__).parents[1]
SIDES = ROOT / "benchmarks" / "step_time_sides"
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in (*SHAPES, *GPU_SHAPES)]
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(names)}; default: those of this machine, see above")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side and shape")
    parser.add_argument("--steps", type=int, default=4, help="steps of a process; the first is left out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sides", default="sdft,trl,sft", help="which of sdft, trl, sft to run")
    parser.add_argument("--texts", type=Path, help="JSONL of chat demonstrations whose user messages fill the prompts (default: common words)")
    parser.add_argument("--out", type=Path, default=Path("step-times"), help="directory of the results (default: ./step-times)")
    options = parser.parse_args()
    default = GPU_SHAPES if torch.cuda.is_available() else SHAPES
    chosen = [shape for shape in (*SHAPES, *GPU_SHAPES) if shape.name in options.shapes] or list(default)
    if unknown := sorted(set(options.shapes) - set(names)):
        parser.error(f"no such shape: {', '.join(unknown)}")
    if options.rounds < 1 or options.steps < 2:
        parser.error("at least one round of two steps is needed")
    sides = options.sides.split(",")
    if "trl" in sides and not TRL_PYTHON.exists():
        parser.error("TRL's environment is missing: make trl (or leave it out: --sides sdft,sft)")
    console = Console(width=max(100, Console().width))
    machine = measure_machine(getattr(torch, options.dtype))
    console.print(machine_line(machine, options.dtype))
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sdft-step-time-") as scratch:
        for shape in chosen:
            model_dir = model_of(shape, Path(scratch))
            spec = asdict(shape) | {"model_dir": str(model_dir), "dtype": options.dtype, "steps": options.steps, "rank": options.rank, "seed": 7}
            spec |= texts_of(shape, model_dir, options.texts)
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for round_number in range(options.rounds):
                for side in sides:
                    console.print(f"{shape.name}: round {round_number + 1} of {options.rounds}, {side} ...", style="dim")
                    runs[side].append(run_side(side, spec, Path(scratch)))
            check_equal_work(runs)
            result = {"shape": asdict(shape), "floor": floor_of(shape, model_dir, runs, machine, options.rank, options.dtype), "runs": runs}
            if "sdft" in sides:
                result["profile"] = run_side("sdft", spec | {"steps": 2, "profile": True}, Path(scratch))["profile"]
            result |= {"machine": machine_line(machine, options.dtype), "steps": options.steps, "dtype": options.dtype, "rank": options.rank}
            print_shape(result, console)
            write(result, options.out)
    return 0


def run_side(side: str, spec: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run one process of a side; returns what it measured."""
    spec_path = scratch / "spec.json"
    spec_path.write_text(json.dumps(spec | {"side": side}))
    python, program = (TRL_PYTHON, SIDES / "trl_trainer.py") if side == "trl" else (Path(sys.executable), SIDES / "own_trainer.py")
    environment = TRAINING_THREADS | os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT) if side != "trl" else ""}
    done = subprocess.run([str(python), str(program), str(spec_path)], capture_output=True, text=True, env=environment, cwd=scratch)
    if done.returncode:
        raise SystemExit(f"{side} failed on {spec['name']}:\n{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def check_equal_work(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Both SDFT trainers must have read the same prompts and sampled as much."""
    seen = {side: {json.dumps(run["tokens"], sort_keys=True) for run in runs[side]} for side in ("sdft", "trl") if side in runs}
    if len(set().union(*seen.values())) > 1:
        raise SystemExit(f"the sides did not do the same work: {seen}")


if __name__ == "__main__":
    sys.exit(main())
