"""docs/operations.md lists every measurement that API and worker give, and no other."""

import re
from pathlib import Path

from prometheus_client import REGISTRY

import api.app  # noqa: F401  (its counters are registered when it is imported)
import worker.measurements  # noqa: F401
from api import measurements
from core.database import Database

ROOT = Path(__file__).parents[2]


def test_every_measurement_is_documented(sqlite_database: Database) -> None:
    text = (ROOT / "docs" / "operations.md").read_text().split("\n## Measurements\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`sdft_[^|]*) \|", text, flags=re.MULTILINE)
    documented = set(re.findall(r"`(sdft_\w+)", " ".join(cells)))
    with sqlite_database.reading() as session:
        from_rows = {family.name for family in measurements.measure_rows(session)}
    counted = {f"{metric.name}_total" if metric.type == "counter" else metric.name for metric in REGISTRY.collect() if metric.name.startswith("sdft_")}
    assert documented == from_rows | counted
