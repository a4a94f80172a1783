"""What a row measured, and what is asked of it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

PERCENTILES = (50, 95, 99)


@dataclass
class Measured:
    """One row on one database. `aims` and `gates` are sentences with whether they are met: a missed aim is told, a missed gate fails
    the program, as does any error."""

    row: str
    database: str
    figure: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    """p50, p95 and p99."""
    errors: dict[str, int] = field(default_factory=dict)
    aims: list[tuple[str, bool]] = field(default_factory=list)
    gates: list[tuple[str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.errors and all(kept for _, kept in self.gates)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def in_milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": 1000 * percentile(seconds, percent) for percent in PERCENTILES} if seconds else {}


def counted(*errors: Counter[str]) -> dict[str, int]:
    """All of them together."""
    return dict(sum(errors, Counter()))
