"""docs/defects.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_the_page_names_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "defects.md").read_text().splitlines() if line.startswith("| ")][1:]
    existing = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    named = [re.findall(r"`(test_\w+)`", row) for row in rows]
    assert len(rows) == 15
    assert all(named)
    assert [name for names in named for name in names if name not in existing] == []
