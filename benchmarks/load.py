"""What a service on this machine bears: polls, creates, uploads, event streams, starts, cancels and the gateway's share of the first token.

    .venv/bin/python -m benchmarks.load [--database sqlite|postgres|both] [--seconds 60] [--only ROW...] [--out load-results]

Every row has a service of its own, of separate processes: the API under uvicorn, a Celery worker and an embedded Valkey, on SQLite or
on a Postgres of its own. The load generator runs on the same cores. Where training itself isn't measured, the trainer is a scripted
one that only writes measurements. Prints the table, writes load.json and load.md to --out, where other rows stay as they are, and
exits non-zero for any error and for a missed gate; aims are figures that depend on the machine, and are only told. About ten minutes
a database.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks.load_parts import report, rows
from benchmarks.load_parts.results import Measured
from benchmarks.load_parts.service import DATABASES, MIB, machine_line, open_descriptors, stop_as_after_ctrl_c
from benchmarks.load_parts.streams import event_streams

OPEN_FILES = 4096


def rows_of(options: argparse.Namespace) -> dict[str, Callable[[str], Measured]]:
    """By the name that --only takes."""
    return {
        "polls": lambda database: rows.polls(database, options.seconds),
        "creates": lambda database: rows.creates(database, options.seconds),
        "upload": lambda database: rows.uploads(database, options.upload_mib * MIB),
        "streams": lambda database: event_streams(database, options.seconds, options.streams),
        "starts": lambda database: rows.starts(database, options.starts),
        "cancel": lambda database: rows.cancels(database, options.cancels),
        "first-token": lambda database: rows.first_tokens(database, options.pairs),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=(*DATABASES, "both"), default="both")
    parser.add_argument("--seconds", type=float, default=60, help="of polls, creates and streams")
    parser.add_argument("--only", nargs="+", metavar="ROW", default=[], help="of polls, creates, upload, streams, starts, cancel, first-token")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--upload-mib", type=int, default=2048, help="size of the uploaded file")
    parser.add_argument("--starts", type=int, default=100, help="jobs whose start is timed")
    parser.add_argument("--cancels", type=int, default=5, help="jobs that train and are cancelled")
    parser.add_argument("--pairs", type=int, default=50, help="chats asked of the gateway and of its inference server")
    parser.add_argument("--out", type=Path, default=Path("load-results"))
    options = parser.parse_args(arguments)
    measure = rows_of(options)
    if unknown := sorted(set(options.only) - measure.keys()):
        parser.error(f"--only: no such row: {', '.join(unknown)}; there are {', '.join(measure)}")
    for name in ("seconds", "streams", "upload_mib", "starts", "cancels", "pairs"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: must be above 0")
    open_descriptors(OPEN_FILES)
    stop_as_after_ctrl_c()
    options.out.mkdir(parents=True, exist_ok=True)
    console, done = Console(), []
    for database in DATABASES if options.database == "both" else (options.database,):
        for name in options.only or measure:
            measured = measure[name](database)
            done.append(measured)
            report.write(measured, machine_line(), options.out)
            console.print(report.told(measured), highlight=False)
    console.print(report.table_of(done))
    return 0 if all(measured.passed for measured in done) else 1


if __name__ == "__main__":
    sys.exit(main())
