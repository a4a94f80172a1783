"""Does the service stay as small as it is? Half an hour of mixed work by several users, and how memory and descriptors go meanwhile.

    .venv/bin/python -m benchmarks.soak [--minutes 30] [--database sqlite|postgres] [--out soak-results]

Starts API, worker, inference server with the real model and Valkey, and polls, lists, uploads, downloads, deletes, chats, streams,
cancels, deletes models and trains small jobs for real, all at once. Memory, descriptors and threads of each process are read every
few seconds; trainers, which live as long as their jobs, are no part of it. After a third of the time, for warming up, a line is fitted
to each. Prints a table, writes soak.json and soak.md to --out, and exits non-zero for any error, for memory that grew by more than 5%
and 8 MiB, and for descriptors that grew by more than 5.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.load_parts.service import DATABASES, machine_line, service_on, stop_as_after_ctrl_c
from benchmarks.soak_parts.trends import MIB, Sample, Sampler, Trend, trend_of
from benchmarks.soak_parts.work import Work

PROCESSES = ("valkey", "inference", "api", "worker")
SAMPLE_SECONDS = 2.0
SETTLE_SECONDS = 10
COLUMNS = ("", "memory MiB", "grew MiB", "MiB/h", "descriptors", "grew", "threads", "most children")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--database", choices=DATABASES, default="sqlite")
    parser.add_argument("--out", type=Path, default=Path("soak-results"))
    options = parser.parse_args(arguments)
    if options.minutes < 1:
        parser.error("--minutes: at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    stop_as_after_ctrl_c()
    with service_on(options.database) as service:
        service.start(*PROCESSES)
        pids = {name: service.pid_of(name) for name in PROCESSES}
        sampler, work = Sampler(pids, SAMPLE_SECONDS), Work(service)
        sampler.start()
        work.start()
        try:
            time.sleep(options.minutes * 60)
        finally:  # interrupted too
            sampler.stop()
            work.stop()
        time.sleep(SETTLE_SECONDS)
        errors = work.errors + Counter(ends_of(pids))
    trends = [trend_of(name, samples) for name, samples in sampler.samples.items()]
    write(options.out, sampler.samples, trends, work.done, errors, options.minutes, options.database)
    console = Console()
    console.print(table_of(trends))
    console.print(f"done: {told(work.done)}", highlight=False)
    faults = [*(fault for trend in trends for fault in trend.faults), *(f"{count} x {kind}" for kind, count in errors.items())]
    for fault in faults:
        console.print(f"FAULT {fault}", highlight=False)
    console.print("no error, and nothing grew" if not faults else f"{len(faults)} faults")
    return 1 if faults else 0


def ends_of(pids: Mapping[str, int]) -> dict[str, int]:
    """What is wrong with the processes once all work is done: one that died, or that has children left."""
    found = {}
    for name, pid in pids.items():
        try:
            left = psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found[f"{name} ended"] = 1
            continue
        if left:
            found[f"{name} has children left"] = len(left)
    return found


def cells_of(trend: Trend) -> list[str]:
    memory = (trend.median_rss_bytes, trend.grown_bytes, trend.grown_bytes_per_hour)
    return [
        trend.process,
        *(f"{value / MIB:.1f}" for value in memory),
        f"{trend.median_descriptors:.0f}",
        f"{trend.grown_descriptors:.1f}",
        f"{trend.median_threads:.0f}",
        str(trend.most_children),
    ]


def table_of(trends: Sequence[Trend]) -> Table:
    table = Table(*COLUMNS, title="after the warm-up")
    for trend in trends:
        table.add_row(*cells_of(trend))
    return table


def told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())) or "nothing"


def write(
    out: Path,
    samples: Mapping[str, Sequence[Sample]],
    trends: Sequence[Trend],
    done: Mapping[str, int],
    errors: Mapping[str, int],
    minutes: float,
    database: str,
) -> None:
    """soak.json, with every sample, and soak.md."""
    every = {name: [asdict(sample) for sample in of_process] for name, of_process in samples.items()}
    content = {"minutes": minutes, "database": database, "done": dict(done), "errors": dict(errors), "samples": every}
    (out / "soak.json").write_text(json.dumps(content) + "\n")
    (out / "soak.md").write_text(page(trends, done, errors, minutes, database))


def page(trends: Sequence[Trend], done: Mapping[str, int], errors: Mapping[str, int], minutes: float, database: str) -> str:
    """soak.md."""
    lines = [
        "# Soak",
        "",
        "Written by `python -m benchmarks.soak --out docs`; every sample is in `soak.json`.",
        "",
        f"{minutes:g} minutes of mixed work on {database}: {told(done)}. Errors: {told(errors) if errors else 'none'}.",
        "",
        "| | " + " | ".join(COLUMNS[1:]) + " |",
        "|---" * len(COLUMNS) + "|",
        *(f"| {' | '.join(cells_of(trend))} |" for trend in trends),
        "",
        "The first third is warm-up and left out. What grew is the rise of a line fitted to the rest; memory and descriptors are medians.",
        *(f"- {fault}" for trend in trends for fault in trend.faults),
        "",
        f"{machine_line()}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
