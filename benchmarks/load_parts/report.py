"""The load table on the terminal, as JSON and as a page."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from benchmarks.load_parts.results import PERCENTILES, Measured

COLUMNS = ("", "", *(f"p{percent} ms" for percent in PERCENTILES), "errors", "aims")
DATABASE_NAMES = {"sqlite": "SQLite", "postgres": "Postgres"}
INTRODUCTION = """\
# Load

Written by `python -m benchmarks.load --out docs`; what was measured is in `load.json`.

Every row has a service of its own: the API under uvicorn, a worker and Valkey, each a process, beside the load generator on the same
cores. Clients keep their connections and send the next request when they have the answer. No row has any error, or the program fails;
it fails too where a gate is missed, while an aim that depends on the machine is told as met or missed."""


def write(measured: Measured, machine: str, out: Path) -> None:
    """Put one row among those that are there."""
    path = out / "load.json"
    rows: dict[str, dict[str, Measured]] = {database: {} for database in DATABASE_NAMES}
    if path.exists():
        for row in json.loads(path.read_text())["rows"]:
            rows[row["database"]][row["row"]] = Measured(**row)
    rows[measured.database][measured.row] = measured
    every = [row for of_database in rows.values() for row in of_database.values()]
    path.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in every]}, indent=1) + "\n")
    (out / "load.md").write_text(page(every, machine))


def page(rows: list[Measured], machine: str) -> str:
    """load.md."""
    lines = [INTRODUCTION]
    for database, name in DATABASE_NAMES.items():
        of_database = [row for row in rows if row.database == database]
        if not of_database:
            continue
        lines += ["", f"## {name}", "", "| | " + " | ".join(COLUMNS[1:]) + " |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cells_of(row))} |" for row in of_database]
        lines += ["", *(f"- **{row.row}**: {'; '.join([*row.notes, *map(said, row.gates)])}." for row in of_database)]
    return "\n".join([*lines, "", f"{machine}.", ""])


def cells_of(measured: Measured) -> list[str]:
    times = [f"{measured.milliseconds[name]:.1f}" if (name := f"p{percent}") in measured.milliseconds else "" for percent in PERCENTILES]
    errors = ", ".join(f"{count} x {kind}" for kind, count in measured.errors.items()) or "0"
    return [measured.row, measured.figure, *times, errors, "; ".join(f"{aim}: {'met' if met else 'missed'}" for aim, met in measured.aims)]


def said(gate: tuple[str, bool]) -> str:
    return gate[0] if gate[1] else f"{gate[0]}: MISSED"


def told(measured: Measured) -> str:
    """A line for the terminal, as soon as the row is measured."""
    return f"{DATABASE_NAMES[measured.database]}, {measured.row}: {'; '.join([measured.figure, *measured.notes, *map(said, measured.gates)])}"


def table_of(rows: list[Measured]) -> Table:
    table = Table("", *COLUMNS, title="load")
    for measured in rows:
        table.add_row(DATABASE_NAMES[measured.database], *cells_of(measured))
    return table
