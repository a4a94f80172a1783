"""How far the demo's result depends on chance: `make demo`'s run for several seeds, each on a data directory of its own.

    .venv/bin/python benchmarks/demo_seeds.py [--seeds 1 2 3 4 5] [--out demo-seeds]

Prints a row as soon as a seed is done: what base, SFT (stopped at SDFT's accuracy on the trained questions) and SDFT answer,
what they keep, and by how much SDFT keeps more than SFT; at the end the smallest and the largest of every column. Takes about
twelve minutes a seed on two cores. A seed's report and its demo's output stay in the --out directory, and a seed whose report
is there already is not run again, so an interrupted run goes on where it was. Exits non-zero where a seed misses a threshold
or its demo can't be run.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


def report_of(seed: int, out: Path) -> dict[str, Any] | None:
    """The seed's report, from an earlier run or a new one. None where the demo ended without one; its data is kept then."""
    report, data_dir, log_path = out / f"seed-{seed}.json", out / f"seed-{seed}-data", out / f"seed-{seed}.log"
    if report.exists():
        print(f"seed {seed}: {report} is there already", file=sys.stderr)
    else:
        print(f"seed {seed}: running, about twelve minutes; to watch: tail -f {log_path}", file=sys.stderr)
        shutil.rmtree(data_dir, ignore_errors=True)
        status = run_demo(seed, data_dir, log_path)
        if not (data_dir / "demo-report.json").exists():
            print(f"seed {seed}: the demo ended with status {status} and no report; see {log_path}", file=sys.stderr)
            return None
        (data_dir / "demo-report.json").rename(report)
        shutil.rmtree(data_dir)
    read: dict[str, Any] = json.loads(report.read_text())
    return read


def run_demo(seed: int, data_dir: Path, log_path: Path) -> int:
    """Returns the exit status. In a session of its own, so that a Ctrl-C reaches this program alone, which lets the demo stop
    its service."""
    with log_path.open("w") as log:
        command = [sys.executable, str(DEMO), "--seed", str(seed), "--data-dir", str(data_dir)]
        demo = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return demo.wait()
        finally:
            if demo.poll() is None:
                demo.terminate()
                demo.wait()


def row_of(report: dict[str, Any]) -> dict[str, float]:
    right, n = report["right"], report["n"]
    row = {"base_paraphrases": right["base"]["paraphrases"] / n["paraphrases"]}
    for arm in ("sft", "sdft"):
        row |= {f"{arm}_{name}": right[arm][name] / n[name] for name in ("trained", "paraphrases")}
        row[f"{arm}_retention"] = right[arm]["retention"] / right["base"]["retention"]
        row[f"{arm}_kept"] = report["probes"][arm]["all"]["kept"] / report["probes"][arm]["all"]["known"]
    row["retention_margin"] = row["sdft_retention"] - row["sft_retention"]
    return row | {"minutes": report["seconds"]["whole_run"] / 60}


def print_row(name: str, row: dict[str, float]) -> None:
    forms = {"minutes": ".1f", "retention_margin": "+.0%"}
    print(f"| {name} | " + " | ".join(f"{value:{forms.get(column, '.0%')}}" for column, value in row.items()) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("demo-seeds"), help="where reports and logs are kept (default: ./demo-seeds)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that a running demo is stopped then too
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, float]] = []
    failed: dict[int, str] = {}
    for seed in arguments.seeds:
        report = report_of(seed, arguments.out)
        if report is None:
            failed[seed] = "the demo crashed"
            continue
        row = row_of(report)
        if not rows:
            print("| seed | " + " | ".join(row) + " |\n" + "|---" * (len(row) + 1) + "|")
        rows.append(row)
        print_row(str(seed), row)
        missed = [check["check"] for check in report["checks"] if not check["holds"]]
        if missed:
            failed[seed] = "does not hold: " + "; ".join(missed)
    if rows:
        print_row("smallest", {column: min(row[column] for row in rows) for column in rows[0]})
        print_row("largest", {column: max(row[column] for row in rows) for column in rows[0]})
    for seed, reason in failed.items():
        print(f"seed {seed}: {reason}")
    print(f"{len(arguments.seeds) - len(failed)} of {len(arguments.seeds)} seeds hold every threshold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
