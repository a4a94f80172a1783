"""How time and memory of a training step grow with completion length, batch, rank and vocabulary.

    .venv/bin/python -m benchmarks.growth [AXIS...] [--steps 3] [--dtype float32] [--out growth-results]

One of these is changed at a time, from 8 x (40 + 32) tokens, rank 16 and the default model's vocabulary of 49,152; other
vocabularies have random weights. Every point is a process of its own whose first step is left out. Prints a table and writes
growth.md and growth.svg to --out. About ten minutes on two cores.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_time import run_side
from benchmarks.step_time_parts.floor import GB, machine_line, measure_machine
from benchmarks.step_time_parts.report import PHASES, median_of
from benchmarks.step_time_parts.shapes import Shape, model_of, texts_of

CENTRE = Shape("centre", batch=8, prompt=40, completion=32)
RANK = 16
DEFAULT_VOCABULARY = 49_152
AXES: dict[str, tuple[int, ...]] = {
    "completion": (8, 32, 64, 128, 256),
    "batch": (2, 4, 8, 16, 32),
    "rank": (4, 16, 64, 128),
    "vocabulary": (DEFAULT_VOCABULARY, 100_000, 150_000),
}
TITLES = {"completion": "completion tokens", "batch": "prompts a step", "rank": "LoRA rank", "vocabulary": "vocabulary"}
COLUMNS = ("step", *PHASES)

Point = dict[str, float]
"""Seconds of the step and of its phases, `peak` bytes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"of {', '.join(AXES)} (default: all)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a process; the first is left out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("growth-results"))
    options = parser.parse_args()
    if unknown := sorted(set(options.axes) - AXES.keys()):
        parser.error(f"no such axis: {', '.join(unknown)}")
    if options.steps < 2:
        parser.error("at least two steps are needed")
    options.out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[int, Point]] = {}
    with tempfile.TemporaryDirectory(prefix="sdft-growth-") as scratch:
        for axis in options.axes or AXES:
            measured[axis] = {}
            for value in AXES[axis]:
                measured[axis][value] = point(axis, value, options.steps, options.dtype, Path(scratch))
                print(row(axis, value, measured[axis][value]), flush=True)
    machine = machine_line(measure_machine(getattr(torch, options.dtype)), options.dtype)
    (options.out / "growth.md").write_text(page(measured, machine))
    plot(measured, options.out / "growth.svg")
    return 0


def shape_at(axis: str, value: int) -> tuple[Shape, int]:
    """The shape and the rank of a point. The default vocabulary is the real model's."""
    if axis == "rank":
        return CENTRE, value
    if axis == "vocabulary":
        return replace(CENTRE, vocabulary=None if value == DEFAULT_VOCABULARY else value), RANK
    return replace(CENTRE, **{axis: value}), RANK


def point(axis: str, value: int, steps: int, dtype: str, scratch: Path) -> Point:
    shape, rank = shape_at(axis, value)
    model_dir = model_of(shape, scratch)
    spec: dict[str, Any] = asdict(shape) | {"model_dir": str(model_dir), "dtype": dtype, "steps": steps, "rank": rank, "seed": 7}
    run = run_side("sdft", spec | texts_of(shape, model_dir, None), scratch)
    return {"step": statistics.median(run["step_seconds"]), "peak": run["peak_bytes"]} | {name: median_of([run], f"{name}_seconds") for name in PHASES}


def row(axis: str, value: int, at: Point) -> str:
    return f"| {TITLES[axis]} | {value:,} | " + " | ".join(f"{at[name]:.2f}" for name in COLUMNS) + f" | {at['peak'] / GB:.2f} |"


def page(measured: dict[str, dict[int, Point]], machine: str) -> str:
    header = "| | | " + " | ".join(f"{name} s" for name in COLUMNS) + " | peak GB |"
    centre = f"{CENTRE.batch} x ({CENTRE.prompt} + {CENTRE.completion}) tokens, rank {RANK} and a vocabulary of {DEFAULT_VOCABULARY:,}"
    lines = [
        "# Growth of a step",
        "",
        f"Written by `python -m benchmarks.growth`. One thing is changed at a time, from {centre}.",
        "",
        header,
        "|---|---" + "|---" * (len(COLUMNS) + 1) + "|",
    ]
    lines += [row(axis, value, at) for axis, points in measured.items() for value, at in points.items()]
    return "\n".join([*lines, "", "![Growth](growth.svg)", "", machine, ""])


def plot(measured: dict[str, dict[int, Point]], path: Path) -> None:
    """Seconds and memory over each axis, all from zero."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sdft"
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, len(measured), figsize=(3.2 * len(measured), 5), squeeze=False)
    for column, (axis, points) in enumerate(measured.items()):
        values = list(points)
        for name in COLUMNS:
            grid[0][column].plot(values, [points[value][name] for value in values], marker="o", markersize=3, label=name)
        grid[1][column].plot(values, [points[value]["peak"] / GB for value in values], marker="o", markersize=3, color="black")
        grid[1][column].set_xlabel(TITLES[axis])
        for cell in (grid[0][column], grid[1][column]):
            cell.set_ylim(bottom=0)
            cell.set_xlim(left=0)
            cell.grid(alpha=0.3)
    grid[0][0].set_ylabel("seconds")
    grid[1][0].set_ylabel("peak GB")
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
