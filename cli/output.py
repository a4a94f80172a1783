"""What commands print. Text that came over the wire is stripped of control characters: it must not drive the terminal."""

import json
import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 10_000


def clean(value: object) -> str:
    """Printable text: control characters but newline and tab are left out."""
    return "".join(character for character in str(value) if character in "\n\t" or character.isprintable())


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf")))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """No cell is ever shortened: a terminal wraps what doesn't fit, a pipe gets one line a row."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=False)
    for row in rows:
        table.add_row(*(Text(clean("-" if cell is None else cell)) for cell in row))
    console.print(table)


def print_fields(value: dict[str, Any]) -> None:
    """An object, one field a line; fields without a value are left out."""
    console = Console(soft_wrap=True)
    for name, field in value.items():
        if field is None or field == [] or name == "object":
            continue
        shown = local_time(field) if name.endswith("_at") or name in ("created", "estimated_finish") else field
        shown = json.dumps(shown, ensure_ascii=False) if isinstance(shown, dict | list) else shown
        console.print(Text.assemble((f"{name}: ", "bold"), clean(shown)))


def local_time(unix_seconds: float | None) -> str:
    return "-" if unix_seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


def duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def byte_size(count: int | None) -> str:
    if count is None:
        return "-"
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
