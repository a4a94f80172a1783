"""step_time.py's results as tables, a page, and sentences about what was aimed at."""

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.step_time_parts.floor import GB
from benchmarks.step_time_parts.shapes import Shape

FLOOR_TARGET = 1.3
BFLOAT16_SPEED = 4.0
"""How many times TRL's speed is aimed at where bfloat16 is fast."""
PHASES = ("rollout", "teacher", "student")
COLUMNS = (*(f"{name} s" for name in ("step", *PHASES, "rest")), "tokens/s", "peak GB")
SIDE_NAMES = {"sdft": "SDFT", "trl": "SDFT in TRL", "sft": "SFT"}
Result = dict[str, Any]
"""What one shape's processes measured, as it stands in step_time.json."""


def write(result: Result, out: Path) -> None:
    """Put one shape's result among those that are there."""
    path = out / "step_time.json"
    results: dict[str, Result] = json.loads(path.read_text()) if path.exists() else {}
    results[title(result)] = result
    path.write_text(json.dumps(results, indent=1))
    (out / "step_time.md").write_text(page(list(results.values())))


def page(results: list[Result]) -> str:
    """step_time.md."""
    lines = ["# Step times", "", "Written by `python -m benchmarks.step_time --out docs`; every measurement is in `step_time.json`."]
    lines += ["", "Medians over processes of their own that took turns; their first step is left out."]
    for result in results:
        rounds = len(next(iter(result["runs"].values())))
        lines += ["", f"## {title(result)}", "", "| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [f"| {' | '.join(cells)} |" for cells in rows_of(result)]
        lines += ["", *(f"- {line}" for line in verdicts(result))]
        lines += ["", told_profile(result)] if "profile" in result else []
        lines += ["", f"{rounds} processes a side, {result['steps']} steps each. {result['machine']}."]
    return "\n".join([*lines, ""])


def median_of(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(value for run in runs for value in run[name])


def title(result: Result) -> str:
    shape = Shape(**result["shape"])
    vocabulary = f", vocabulary {shape.vocabulary:,}" if shape.vocabulary else ""
    return f"{shape.name}: {shape.batch} x ({shape.prompt} + {shape.completion}) tokens{vocabulary}, {result['dtype']}, rank {result['rank']}"


def told_profile(result: Result) -> str:
    shares = sorted(result["profile"].items(), key=lambda item: -item[1])
    return f"Where SDFT's time goes (torch's profiler, one step): {', '.join(f'{kind} {share:.0%}' for kind, share in shares)}."


def rows_of(result: Result) -> list[list[str]]:
    """A name and the COLUMNS for every side, and the floor."""
    shape, runs, floor = Shape(**result["shape"]), result["runs"], result["floor"]
    rows = []
    for side, of_side in runs.items():
        step = median_of(of_side, "step_seconds")
        phases = [median_of(of_side, f"{phase}_seconds") if of_side[0].get(f"{phase}_seconds") else 0.0 for phase in PHASES]
        memory = statistics.median(run["peak_bytes"] for run in of_side) / GB
        cells = [*(f"{value:.2f}" if value else "-" for value in (step, *phases)), f"{rest_of(of_side):.2f}"]
        rows.append([SIDE_NAMES[side], *cells, f"{shape.batch * (shape.prompt + shape.completion) / step:.0f}", f"{memory:.2f}"])
    rows.append(["floor", *(f"{floor[name]:.2f}" for name in ("step", *PHASES)), "", "", ""])
    return rows


def rest_of(runs: list[dict[str, Any]]) -> float:
    """Median over all steps of what its phases leave of it, seconds."""
    rests = []
    for run in runs:
        phases = [run[f"{phase}_seconds"] for phase in PHASES if run.get(f"{phase}_seconds")]
        rests += [step - sum(parts) for step, *parts in zip(run["step_seconds"], *phases, strict=True)]
    return statistics.median(rests)


def print_shape(result: Result, console: Console) -> None:
    table = Table("", *COLUMNS, title=title(result))
    for cells in rows_of(result):
        table.add_row(*cells)
    console.print(table)
    for line in verdicts(result):
        console.print(f"  {line}")
    if "profile" in result:
        console.print(told_profile(result))


def verdicts(result: Result) -> list[str]:
    """What was aimed at and what was reached; ratios are medians over the rounds of paired processes."""
    shape, runs, floor = Shape(**result["shape"]), result["runs"], result["floor"]
    aimed_speed = max(shape.aimed_speed, BFLOAT16_SPEED) if result["dtype"] == "bfloat16" else shape.aimed_speed
    if "sdft" not in runs:
        return []

    def paired(side: str, value: Any) -> float:
        return statistics.median(value(other) / value(own) for own, other in zip(runs["sdft"], runs[side], strict=True))

    def seconds(run: dict[str, Any]) -> float:
        return statistics.median(run["step_seconds"])

    over = median_of(runs["sdft"], "step_seconds") / floor["step"]
    lines = [f"{over:.2f} times the floor (aim: at most {FLOOR_TARGET}): {'reached' if over <= FLOOR_TARGET else 'missed'}"]
    if "trl" in runs:
        speed, memory = paired("trl", seconds), paired("trl", lambda run: run["peak_bytes"])
        lines.append(f"{speed:.2f} times TRL's speed (aim: at least {aimed_speed}): {'reached' if speed >= aimed_speed else 'missed'}")
        aim = f" (aim: at most 0.5): {'reached' if memory >= 2 else 'missed'}" if shape.aims_at_half_the_memory else ""
        lines.append(f"{1 / memory:.2f} of TRL's peak memory{aim}")
    if "sft" in runs:
        lines.append(f"{1 / paired('sft', seconds):.1f} times the time of an SFT step on the same rows (aim: at most 3)")
    return lines
