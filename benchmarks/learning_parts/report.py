"""learning.py's results as a table, a picture and sentences about what was aimed at."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.learning_parts.bench import Count, Scores
from sdft_engine.contract.probes import wilson_interval

Rows = dict[str, dict[int, Scores]]
"""By row of the table, by seed."""

LEAST_PARAPHRASES = 0.9
LEAST_RETENTION = 0.95
MOST_KL_OF_MATCHED = 0.5
SDFT_ROWS = "SDFT"
HEADER = ("", "seeds", "trained", "paraphrases", "general, of the base's", "kept", "KL from base")


def table(rows: Rows) -> str:
    """A Markdown table: percentages with 95% intervals (Wilson) over all seeds' questions; in brackets the smallest and the
    largest seed."""
    base = general_of_base(rows)
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for name, by_seed in rows.items():
        scores = list(by_seed.values())
        retention = [each.general.right / base for each in scores if each.general]
        cells = [
            name + (f" (stopped at step {_range(s.extra['step'] for s in scores)})" if "step" in scores[0].extra else ""),
            str(len(scores)),
            _share([each.trained for each in scores]),
            _share([each.paraphrases for each in scores]),
            f"{sum(retention) / len(retention):.0%}{_spread(retention)}" if retention else "",
            _share([each.retained for each in scores if each.retained]),
            _mean([each.kl_from_base for each in scores if each.kl_from_base is not None], ".3f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def general_of_base(rows: Rows) -> int:
    scores = next(iter(rows["base"].values()))
    assert scores.general is not None
    return scores.general.right


def verdicts(rows: Rows) -> list[str]:
    """What was aimed at, row by row of SDFT: paraphrases, general questions, and the distance from the base against that of the SFT
    that moves least from it of those that know as many trained questions, over the seeds in which both are there."""
    base = general_of_base(rows)
    matched = [by_seed for name, by_seed in rows.items() if name.endswith(", matched") and "anchored" not in name]
    lines = []
    for name, by_seed in rows.items():
        if not name.startswith(SDFT_ROWS):
            continue
        paraphrases = _pooled([scores.paraphrases for scores in by_seed.values()])
        retention = sum(scores.general.right for scores in by_seed.values() if scores.general) / base / len(by_seed)
        kept = _pooled([scores.retained for scores in by_seed.values() if scores.retained])
        parts = [
            _aim(f"paraphrases {paraphrases:.1%}", f"at least {LEAST_PARAPHRASES:.0%}", paraphrases >= LEAST_PARAPHRASES),
            _aim(f"general questions {retention:.1%} of the base's", f"at least {LEAST_RETENTION:.0%}", retention >= LEAST_RETENTION),
            f"of those that the base answers, {kept:.1%} are still answered",
        ]
        ratios = [ratio for of_sft in matched if (ratio := _kl_ratio(by_seed, of_sft)) is not None]
        if ratios:
            ratio = max(ratios)
            parts.append(_aim(f"KL from base {ratio:.2f} of matched SFT's", f"at most {MOST_KL_OF_MATCHED}", ratio <= MOST_KL_OF_MATCHED))
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def _aim(measured: str, aim: str, reached: bool) -> str:
    return f"{measured} (aim: {aim}, {'reached' if reached else 'missed'})"


def plot(rows: Rows, path: Path) -> None:
    """New task against prior tasks: a small point for every seed, a large one for their mean."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sdft"
    from matplotlib import pyplot

    base = general_of_base(rows)
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for number, (name, by_seed) in enumerate(rows.items()):
        points = [(100 * s.general.right / base, 100 * s.paraphrases.right / s.paraphrases.n) for s in by_seed.values() if s.general]
        if not points:
            continue
        colour, marker = pyplot.colormaps["tab20"](number % 20), "*" if name.startswith(SDFT_ROWS) else "o" if name.startswith("SFT") else "s"
        axes.scatter(*zip(*points, strict=True), color=colour, marker=marker, s=18, alpha=0.5)
        mean = [sum(values) / len(points) for values in zip(*points, strict=True)]
        axes.scatter(*mean, color=colour, marker=marker, s=110, label=name)
    axes.set_xlabel("general questions answered, % of the base's")
    axes.set_ylabel("paraphrases answered, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def to_json(rows: Rows) -> dict[str, Any]:
    return {name: {str(seed): asdict(scores) for seed, scores in by_seed.items()} for name, by_seed in rows.items()}


def from_json(path: Path) -> Rows:
    saved = json.loads(path.read_text())["rows"]
    return {name: {int(seed): _scores(values) for seed, values in by_seed.items()} for name, by_seed in saved.items()}


def _scores(values: dict[str, Any]) -> Scores:
    counts = {key: Count(**values[key]) if values[key] else None for key in ("trained", "paraphrases", "general", "retained")}
    return Scores(**(values | counts))


def _pooled(counts: list[Count]) -> float:
    return sum(count.right for count in counts) / sum(count.n for count in counts)


def _kl_ratio(mine: dict[int, Scores], theirs: dict[int, Scores]) -> float | None:
    """Of the mean KLs over the seeds that have both; None without one."""
    pairs = [
        (own, other)
        for seed in mine.keys() & theirs.keys()
        if (own := mine[seed].kl_from_base) is not None and (other := theirs[seed].kl_from_base) is not None
    ]
    return sum(own for own, _ in pairs) / sum(other for _, other in pairs) if pairs else None


def _share(counts: list[Count]) -> str:
    if not counts:
        return ""
    low, high = wilson_interval(sum(count.right for count in counts), sum(count.n for count in counts))
    return f"{_pooled(counts):.0%} [{100 * low:.0f}, {100 * high:.0f}]{_spread([count.right / count.n for count in counts])}"


def _spread(values: list[float]) -> str:
    return f" ({100 * min(values):.0f} to {100 * max(values):.0f})" if len(values) > 1 else ""


def _range(values: Iterable[float]) -> str:
    found = sorted(int(value) for value in values)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _mean(values: list[float], form: str) -> str:
    return format(sum(values) / len(values), form) if values else ""
