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
shape and precision; the others stay. On two cores three rounds of all shapes take about an hour.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from core.settings import Settings
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.contract.thread_pool import TRAINING_THREADS
from sdft_engine.model import choose_device
from sdft_engine.prepare_base_model import prepare_base_model
from sdft_engine.products import frozen_linear

ROOT = Path(__file__).parents[1]
SIDES = ROOT / "benchmarks" / "step_time_sides"
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
BASE_MODEL = "smollm2-135m-instruct"
TEACHER_TEMPLATE = "{question}\n\n{demonstration}"
WORDS = """river lamp stone garden winter paper window music table bread green seven market silver morning letter forest engine water
mountain simple yellow story kitchen summer house bridge circle ocean field"""
FILLERS = (" so", " a", ".", "x", "!")
"""One of them is a single token in most vocabularies."""
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """`prompt` counts the chat template's tokens; `vocabulary`: random weights with an embedding and head of that many rows."""

    name: str
    batch: int
    prompt: int
    completion: int
    vocabulary: int | None = None
    size: str | None = None
    """Of SIZES: random weights of these dimensions instead of the default model's."""
    fastest: float = 2.0
    """How many times TRL's speed is aimed at."""
    half_the_memory: bool = True


SHAPES = (
    Shape("short", 8, 40, 24, half_the_memory=False),
    Shape("long", 4, 1000, 128, fastest=1.5),
    Shape("large", 32, 200, 64),
    Shape("wide", 8, 40, 128, vocabulary=150_000),
)
SIZES: dict[str, dict[str, int]] = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 152_064,
    },
}
GPU_SHAPES = (
    Shape("1.5b", 32, 200, 256, size="1.5B", fastest=4.0),
    Shape("7b", 16, 200, 256, size="7B", fastest=4.0),
)
FLOOR_TARGET = 1.3
PHASES = ("rollout", "teacher", "student")
COLUMNS = (*(f"{name} s" for name in ("step", *PHASES, "rest")), "tokens/s", "peak GB")
SIDE_NAMES = {"sdft": "SDFT", "trl": "SDFT in TRL", "sft": "SFT"}
Result = dict[str, Any]
"""What one shape's processes measured, as it stands in step_time.json."""


@dataclass(frozen=True)
class Machine:
    """Measured: `flops` of a large product a second, in the chosen precision, `bandwidth` in bytes read a second."""

    flops: float
    bandwidth: float


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
            result |= {"machine": machine_line(machine, options.dtype), "steps": options.steps, "dtype": options.dtype}
            print_shape(result, console)
            write(result, options.out)
    return 0


def write(result: Result, out: Path) -> None:
    """Put one shape's result among those that are there."""
    path = out / "step_time.json"
    results: dict[str, Result] = json.loads(path.read_text()) if path.exists() else {}
    results[f"{result['shape']['name']}, {result['dtype']}"] = result
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
        lines += ["", *(f"- {line}" for line in verdicts(Shape(**result["shape"]), result["runs"], result["floor"]))]
        lines += ["", told_profile(result)] if "profile" in result else []
        lines += ["", f"{rounds} processes a side, {result['steps']} steps each. {result['machine']}."]
    return "\n".join([*lines, ""])


def machine_line(machine: Machine, dtype: str) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{device}, torch {torch.__version__}, {dtype}: large products {machine.flops / GB:.0f} GFLOP/s, reading {machine.bandwidth / GB:.1f} GB/s"


def measure_machine(dtype: torch.dtype, seconds: float = 1.0) -> Machine:
    device = choose_device("auto")
    size = 8192 if device.type == "cuda" else 1536 if dtype == torch.float32 else 768
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    big = torch.randn(1 << (30 if device.type == "cuda" else 26), device=device)
    fastest = min(_median_seconds(product, seconds) for product in (lambda: a @ b, lambda: frozen_linear(a, b)))
    return Machine(2 * size**3 / fastest, big.nbytes / _median_seconds(lambda: big.sum(), seconds))


def _median_seconds(work: Any, seconds: float) -> float:
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def model_of(shape: Shape, scratch: Path) -> Path:
    """The default base model, or its family with another vocabulary or other dimensions and random weights."""
    settings = Settings()
    entry = next(each for each in settings.base_models if each.id == BASE_MODEL)
    base = prepare_base_model(entry.id, entry.source, entry.revision, entry.directory(settings.cache_dir))
    if shape.vocabulary is None and shape.size is None:
        return base
    directory = scratch / f"{shape.size or 'default'}-vocabulary-{shape.vocabulary}"
    directory.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    config = AutoConfig.from_pretrained(base)
    for name, value in (SIZES[shape.size] if shape.size else {"vocab_size": shape.vocabulary}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if shape.size else torch.float32)
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items() if name != "lm_head.weight"},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    config.save_pretrained(directory)
    return directory


def texts_of(shape: Shape, model_dir: Path, source: Path | None) -> dict[str, Any]:
    """Questions of exactly `prompt` tokens with the chat template, and answers of about `completion` tokens."""
    chat_format = ChatFormat.from_directory(model_dir)
    words = cycle(_words(source))

    def text(fits: Any) -> str:
        chosen: list[str] = []
        while fits(" ".join([*chosen, "x"])):
            chosen.append(next(words))
        while not fits(" ".join(chosen)):
            chosen.pop()
        return " ".join(chosen)

    def question() -> str:
        def length(content: str) -> int:
            return len(chat_format.prompt_ids([{"role": "user", "content": content}]))

        content = text(lambda content: length(content) <= shape.prompt)
        while length(content) < shape.prompt:
            longer = next((content + filler for filler in FILLERS if length(content) < length(content + filler) <= shape.prompt), None)
            if longer is None:
                raise SystemExit(f"no question of exactly {shape.prompt} tokens was found")
            content = longer
        return content

    questions = [question() for _ in range(shape.batch)]
    answers = [text(lambda content: len(chat_format.encode(content)) <= shape.completion) for _ in range(shape.batch)]
    return {"questions": questions, "answers": answers, "template": TEACHER_TEMPLATE}


def _words(source: Path | None) -> Iterator[str] | tuple[str, ...]:
    if source is None:
        words, generator = WORDS.split(), torch.Generator().manual_seed(3)
        return tuple(words[index] for index in torch.randint(len(words), (4099,), generator=generator).tolist())
    messages = [m for line in source.read_text().splitlines() if line.strip() for m in json.loads(line)["messages"]]
    return tuple(word for m in messages if m["role"] == "user" for word in m["content"].split())


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


def floor_of(shape: Shape, model_dir: Path, runs: dict[str, list[dict[str, Any]]], machine: Machine, rank: int, dtype: str) -> dict[str, float]:
    """Seconds of each phase at the machine's measured speeds, see above."""
    config = AutoConfig.from_pretrained(model_dir)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    outputs = [(hidden, (heads + 2 * config.num_key_value_heads) * head_size), (heads * head_size, hidden), (hidden, 2 * config.intermediate_size)]
    outputs.append((config.intermediate_size, hidden))
    linear = config.num_hidden_layers * sum(a * b for a, b in outputs)
    head = config.vocab_size * hidden
    factors = config.num_hidden_layers * rank * (3 * hidden + (heads + 2 * config.num_key_value_heads) * head_size + heads * head_size + hidden)
    factors += config.num_hidden_layers * rank * (2 * hidden + 3 * config.intermediate_size + hidden)
    attention = 4 * config.num_hidden_layers * heads * head_size  # times the positions that a token sees

    def read(tokens: int) -> float:
        return tokens * 2 * linear + attention * tokens * tokens / 2

    some = next((runs[side][0] for side in ("sdft", "trl") if side in runs), None)
    teacher_prompt = some["tokens"]["teacher_prompt"] / shape.batch if some else shape.prompt
    element = 4 if dtype == "float32" else 2
    one_read = element * (linear + head) / machine.bandwidth
    decoding = sum(
        max(one_read, shape.batch * (2 * (linear + head) + attention * (shape.prompt + step)) / machine.flops) for step in range(1, shape.completion)
    )
    rollout = shape.batch * (read(shape.prompt) + 2 * head) / machine.flops + decoding
    teacher = shape.batch * (read(int(teacher_prompt) + shape.completion) + 2 * head * shape.completion) / machine.flops
    length = shape.prompt + shape.completion
    student = shape.batch * (2 * read(length) + attention * length * length / 4 + 6 * factors * length + 4 * head * shape.completion) / machine.flops
    return {"rollout": rollout, "teacher": teacher, "student": student, "step": rollout + teacher + student}


def median_of(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(value for run in runs for value in run[name])


def title(result: Result) -> str:
    shape = Shape(**result["shape"])
    vocabulary = f", vocabulary {shape.vocabulary:,}" if shape.vocabulary else ""
    return f"{shape.name}: {shape.batch} x ({shape.prompt} + {shape.completion}) tokens{vocabulary}, {result['dtype']}"


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
        cells = [f"{value:.2f}" if value else "-" for value in (step, *phases, step - sum(phases))]
        rows.append([SIDE_NAMES[side], *cells, f"{shape.batch * (shape.prompt + shape.completion) / step:.0f}", f"{memory:.2f}"])
    rows.append(["floor", *(f"{floor[name]:.2f}" for name in ("step", *PHASES)), "", "", ""])
    return rows


def print_shape(result: Result, console: Console) -> None:
    table = Table("", *COLUMNS, title=title(result))
    for cells in rows_of(result):
        table.add_row(*cells)
    console.print(table)
    for line in verdicts(Shape(**result["shape"]), result["runs"], result["floor"]):
        console.print(f"  {line}")
    if "profile" in result:
        console.print(told_profile(result))


def verdicts(shape: Shape, runs: dict[str, list[dict[str, Any]]], floor: dict[str, float]) -> list[str]:
    """What was aimed at and what was reached; ratios are medians over the rounds of paired processes."""
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
        lines.append(f"{speed:.2f} times TRL's speed (aim: at least {shape.fastest}): {'reached' if speed >= shape.fastest else 'missed'}")
        aim = f" (aim: at most 0.5): {'reached' if memory >= 2 else 'missed'}" if shape.half_the_memory else ""
        lines.append(f"{1 / memory:.2f} of TRL's peak memory{aim}")
    if "sft" in runs:
        lines.append(f"{1 / paired('sft', seconds):.1f} times the time of an SFT step on the same rows (aim: at most 3)")
    return lines


if __name__ == "__main__":
    sys.exit(main())
