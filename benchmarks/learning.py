"""What is learned and what is forgotten: SDFT, SFT and the paper's other arms on the demo's data, several seeds.

    .venv/bin/python -m benchmarks.learning [--seeds 1 2 3] [--arms NAME ...] [--out learning-results] [--short]

Every arm trains LoRA adapters of one shape on the same 24 demonstrations of a 135M model, in this process; trained questions,
paraphrases and 200 general questions are asked greedily, and the KL from the base is measured on the base's own answers to
the general questions. "SFT ..., matched" is SFT stopped at the first checkpoint that knows as many trained questions as the
same seed's SDFT. Prints a row as soon as it is there; writes results.json, results.md and results.svg to --out. What is in
results.json already is not run again, so an interrupted run goes on where it was; results of other settings are refused. All
arms and seeds take two to three hours on two cores; --short takes a few steps and questions of each, a minute or two, and shows
only that all of it works.
"""

import os

from sdft_engine.contract.thread_pool import TRAINING_THREADS

os.environ.update(TRAINING_THREADS | os.environ)  # before torch is imported

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning_parts import arms as learning_arms
from benchmarks.learning_parts.arms import ARMS, Arm
from benchmarks.learning_parts.bench import DATA_DIR, MAX_ANSWER_TOKENS, SDFT, SUPERVISED, VIEW, Bench, Scores
from benchmarks.learning_parts.report import HEADER, Rows, from_json, plot, table, to_json, verdicts

SHORT_QUESTIONS = 3
SHORT = {"n_epochs": 1, "batch_size": 12}
FIRST_SEED = 1
BASE = "base"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], metavar="NAME", help=f"of {'; '.join(repr(arm.name) for arm in ARMS)}")
    parser.add_argument("--out", type=Path, default=Path("learning-results"), help="directory of the results (default: ./learning-results)")
    parser.add_argument("--short", action="store_true", help="two steps and three questions of everything, one seed")
    options = parser.parse_args()
    if options.short:
        for settings in (SDFT, SUPERVISED, learning_arms.RESTORATION, learning_arms.LIMITS):
            settings.update(SHORT)
        options.seeds = options.seeds[:1]
    options.out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options.short)
    path = options.out / "results.json"
    if path.exists() and json.loads(path.read_text())["settings"] != settings:
        parser.error(f"{path} holds results of other settings: remove it, or name another directory (--out)")
    chosen = [arm for arm in ARMS if options.arms is None or arm.name in (BASE, *options.arms)]  # what is kept is counted against the base
    rows = run_arms(Bench(SHORT_QUESTIONS if options.short else None), chosen, options.seeds, path, settings)
    print("\n".join(["", table(rows), "", *verdicts(rows)]))
    plot(rows, options.out / "results.svg")
    (options.out / "results.md").write_text(page(rows, json.loads(path.read_text())["machines"], short=options.short))
    return 0


def settings_of(short: bool) -> dict[str, Any]:
    """Of which all rows of a results.json are: the arms' hyperparameters, how the teacher is shown what it knows, and the data."""
    data = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(DATA_DIR.glob("*.jsonl")))).hexdigest()
    named = {"sdft": SDFT, "supervised": SUPERVISED, "restoration": learning_arms.RESTORATION, "anchor": learning_arms.ANCHOR}
    return named | {"template": VIEW.template, "answer_tokens": MAX_ANSWER_TOKENS, "short": short, "data": data}


def run_arms(bench: Bench, arms: Iterable[Arm], seeds: list[int], path: Path, settings: dict[str, Any]) -> Rows:
    """Every arm of a seed, then the next seed's. What `path` holds already is kept; every new row is written there at once."""
    rows = from_json(path) if path.exists() else {}
    machines = set(json.loads(path.read_text())["machines"]) if path.exists() else set()
    for seed in seeds:
        for arm in arms:
            own_seed = seed if arm.seeded else FIRST_SEED
            if own_seed in rows.get(arm.name, {}):
                continue
            so_far: dict[str, Scores] = {name: by_seed[own_seed] for name, by_seed in rows.items() if own_seed in by_seed}
            for name, scores in arm.run(bench, own_seed, so_far).items():
                rows.setdefault(name, {})[own_seed] = scores
                print(f"seed {own_seed}: {told(name, scores)}", flush=True)
            machines.add(machine())
            path.write_text(json.dumps({"settings": settings, "machines": sorted(machines), "rows": to_json(rows)}, indent=1))
    order = [name for arm in ARMS for name in (arm.name, f"{arm.name}, matched")]
    return {name: rows[name] for name in order if name in rows}


def told(name: str, scores: Scores) -> str:
    counts = {"trained": scores.trained, "paraphrases": scores.paraphrases, "general": scores.general, "kept": scores.retained}
    parts = [f"{kind} {count.right}/{count.n}" for kind, count in counts.items() if count]
    parts += [f"KL from base {scores.kl_from_base:.3f}"] if scores.kl_from_base is not None else []
    return f"{name}: {', '.join([*parts, *(f'{key} {value:.3g}' for key, value in scores.extra.items())])}"


def machine() -> str:
    return f"{os.cpu_count()} cores, torch {torch.__version__}, float32"


def page(rows: Rows, machines: list[str], *, short: bool) -> str:
    """results.md."""
    trained, paraphrases, of_base, kept, kl = HEADER[2:7]
    title = "# Results" + (": a short run, which shows only that the program works" if short else "")
    teacher = next(iter(rows["teacher"].values())) if "teacher" in rows else None
    sentences = [
        "Written by `python -m benchmarks.learning --out docs`; rows and seeds one by one are in `results.json`.",
        "",
        "SmolLM2-135M-Instruct, LoRA of rank 16 on every linear layer, on the 24 invented support facts of `examples/support_facts`. "
        f'"{trained}" are the 24 trained questions, "{paraphrases}" the 48 others about the same facts, "{of_base}" is the number of 200 '
        f'general questions answered, as a share of the number that the base answers, "{kept}" the share of those that the base answers, '
        f'and "{kl}" the mean KL(base ‖ model) in nats over the tokens of the base\'s own answers to them. All answers are greedy. Square '
        "brackets: 95% intervals (Wilson) over the questions of all seeds; round ones: smallest and largest seed. Seeds ask the same "
        "questions, so the intervals are a little too narrow.",
        "",
        table(rows),
        "",
        "![Paraphrases against general questions](results.svg)",
        "",
        "## What was aimed at",
        "",
        *(f"- {line}" for line in verdicts(rows)),
    ]
    if teacher is not None:
        share, far = teacher.paraphrases.right / teacher.paraphrases.n, teacher.extra["kl_of_own_samples"]
        sentences += [
            "",
            f"The teacher itself, shown the demonstration, answers {share:.1%} of the paraphrases; whoever learns from it alone can't be expected to "
            f"answer more. Its own samples, scored by the base without the demonstration, are {far:.2f} nats a token away from it.",
        ]
    return "\n".join([title, "", *sentences, "", f"Measured on {'; '.join(machines)}.", ""])


if __name__ == "__main__":
    sys.exit(main())
