"""What the demo found: its tables, the checks that decide its exit status, and the report that it saves."""

from dataclasses import dataclass
from typing import Any

from demo_scoring import Question, Score
from rich.console import Console
from rich.table import Table

from sdft_engine.contract.probes import wilson_interval

MOST_BASE_PARAPHRASES = 0.10
LEAST_SDFT_PARAPHRASES = 0.70
LEAST_RETENTION = 0.75
"""What every one of five seeds kept with room to spare (benchmarks/demo_seeds.py). Seeds differ by more than ten points: a threshold
nearer to their mean would fail by chance."""
ALL_PROBES = "all"
PARTS = {
    "service_start": "service start",
    "sdft_training": "SDFT training",
    "scoring": "scoring",
    "sft": "SFT with the scoring of its checkpoints",
    "whole_run": "whole run",
}
"""Of a run, in the order in which they are printed."""


@dataclass
class Results:
    """Scores by set ("trained", "paraphrases", "retention") of each arm. `seconds` has those of `PARTS` that were measured."""

    questions: dict[str, list[Question]]
    base: dict[str, Score]
    teacher: dict[str, Score]
    sdft: dict[str, Score]
    sft: dict[str, Score]
    sft_step: int
    seconds: dict[str, float]

    def retention(self, arm: dict[str, Score]) -> "ProbeCount":
        """Of the general questions that the base answers, those that an arm still answers: what it gained hides nothing."""
        return by_probe(self.questions["retention"], self.base["retention"], arm["retention"])[ALL_PROBES]

    @property
    def matched(self) -> bool:
        return self.sft["trained"].right >= self.sdft["trained"].right


@dataclass(frozen=True)
class ProbeCount:
    """One kind of general question: `right` of `n` are answered, and `kept` of the `known` ones that the base answers."""

    right: int
    n: int
    kept: int
    known: int

    @property
    def kept_share(self) -> float:
        return self.kept / self.known


def by_probe(questions: list[Question], base: Score, arm: Score) -> dict[str, ProbeCount]:
    """An arm's counts for each probe, in the questions' order, and for all of them together."""
    probes = [question.probe or "-" for question in questions]
    counts = {}
    for probe in (*dict.fromkeys(probes), ALL_PROBES):
        rows = [row for row, name in enumerate(probes) if probe in (name, ALL_PROBES)]
        known = [row for row in rows if base.hits[row]]
        counts[probe] = ProbeCount(sum(arm.hits[row] for row in rows), len(rows), sum(arm.hits[row] for row in known), len(known))
    return counts


def probes_of_arms(results: Results) -> dict[str, dict[str, ProbeCount]]:
    base = results.base["retention"]
    arms = {"base": results.base, "sft": results.sft, "sdft": results.sdft}
    return {name: by_probe(results.questions["retention"], base, arm["retention"]) for name, arm in arms.items()}


def print_results(results: Results, console: Console) -> None:
    console.print(_sets_table(results))
    console.print(_probes_table(results))
    console.print(_answers_table(results))
    if not results.matched:
        console.print("SFT never knew as many of the trained questions as SDFT; its best checkpoint is shown, so the comparison is not matched.")


def _sets_table(results: Results) -> Table:
    table = Table(title="Share answered, with 95% intervals (Wilson). Retention: of what the base answers, what is still answered")
    for heading in ("", "trained questions", "paraphrases", "general questions", "retention"):
        table.add_column(heading, justify="left" if not heading else "right")
    arms = {
        "base": results.base,
        "base shown the demonstration": results.teacher,
        f"SFT (stopped at step {results.sft_step})": results.sft,
        "SDFT": results.sdft,
    }
    for name, arm in arms.items():
        cells = [_cell(arm[key].right, arm[key].n) if key in arm else "-" for key in ("trained", "paraphrases", "retention")]
        kept = results.retention(arm) if "retention" in arm else None
        table.add_row(name, *cells, f"{kept.kept_share:.0%} ({kept.kept}/{kept.known})" if kept else "-")
    return table


def _probes_table(results: Results) -> Table:
    table = Table(title="General questions by kind, with 95% intervals (Wilson)")
    for heading in ("kind", "model", "answered", "kept of those the base knew"):
        table.add_column(heading, justify="left" if heading in ("kind", "model") else "right")
    arms = probes_of_arms(results)
    for probe in arms["base"]:
        table.add_section()
        for arm, title in (("base", "base"), ("sft", "SFT"), ("sdft", "SDFT")):
            count = arms[arm][probe]
            kept = "-" if arm == "base" or not count.known else _cell(count.kept, count.known)
            table.add_row(probe if arm == "base" else "", title, _cell(count.right, count.n), kept)
    return table


def _answers_table(results: Results) -> Table:
    table = Table(title="Side by side", show_lines=True)
    for heading in ("question", "base", "SFT", "SDFT"):
        table.add_column(heading, overflow="fold")
    for name, rows in (("paraphrases", (0, 2, 4)), ("retention", (0, 25, 31))):
        for row in rows:
            answers = (arm[name].answers[row].strip() for arm in (results.base, results.sft, results.sdft))
            table.add_row(results.questions[name][row].text, *answers)
    return table


def _cell(right: int, n: int) -> str:
    low, high = wilson_interval(right, n)
    return f"{right / n:.0%} [{low:.0%}-{high:.0%}] n={n}"


def verdict(results: Results) -> list[tuple[bool, str]]:
    """What must hold, and whether it does."""
    sdft, sft = results.retention(results.sdft).kept_share, results.retention(results.sft).kept_share
    learned = results.sdft["paraphrases"].accuracy
    known = results.base["paraphrases"].accuracy
    trained = f"{results.sft['trained'].accuracy:.0%} against {results.sdft['trained'].accuracy:.0%}"
    return [
        (known <= MOST_BASE_PARAPHRASES, f"the base answers {known:.0%} of the paraphrases (at most {MOST_BASE_PARAPHRASES:.0%})"),
        (learned >= LEAST_SDFT_PARAPHRASES, f"SDFT answers {learned:.0%} of the paraphrases (at least {LEAST_SDFT_PARAPHRASES:.0%})"),
        (sdft >= LEAST_RETENTION, f"of the general questions that the base answers, SDFT still answers {sdft:.0%} (at least {LEAST_RETENTION:.0%})"),
        (results.matched, f"SFT reached SDFT's accuracy on the trained questions ({trained})"),
        (sdft > sft, f"SDFT keeps more than SFT ({sdft:.0%} against {sft:.0%})"),
    ]


def report_of(results: Results, seed: int) -> dict[str, Any]:
    """What demo-report.json holds: counts by arm and set, by arm and probe, the checks, and seconds by part of the run."""
    arms = {"base": results.base, "teacher": results.teacher, "sft": results.sft, "sdft": results.sdft}
    return {
        "seed": seed,
        "sft_step": results.sft_step,
        "n": {key: score.n for key, score in results.sdft.items()},
        "right": {name: {key: score.right for key, score in arm.items()} for name, arm in arms.items()},
        "probes": {arm: {probe: vars(count) for probe, count in counts.items()} for arm, counts in probes_of_arms(results).items()},
        "checks": [{"holds": holds, "check": sentence} for holds, sentence in verdict(results)],
        "seconds": results.seconds,
    }


def durations(seconds: dict[str, float]) -> str:
    """`service start 21 s, SDFT training 9.8 min, …, whole run 18.0 min`"""
    spent = ((title, seconds[part]) for part, title in PARTS.items() if part in seconds)
    return ", ".join(f"{title} {value:.0f} s" if value < 60 else f"{title} {value / 60:.1f} min" for title, value in spent)
