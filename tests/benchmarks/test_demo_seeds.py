"""The program that repeats the demo, with a fake demo in its place."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import demo_seeds

FAKE_DEMO = """
import argparse, json, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int)
parser.add_argument("--data-dir", type=Path)
arguments = parser.parse_args()
seed = arguments.seed
with open({runs!r}, "a") as runs:
    runs.write(f"{{seed}}\\n")
arguments.data_dir.mkdir()
print("the demo of seed", seed)
if seed == 3 and {crash}:
    sys.exit(2)
right = {{
    "base": {{"paraphrases": 1, "retention": 50}},
    "sft": {{"trained": 27, "paraphrases": 30, "retention": 40 - seed}},
    "sdft": {{"trained": 27, "paraphrases": 48 + seed, "retention": 50 - seed}},
}}
probes = {{"sft": {{"all": {{"kept": 30, "known": 50}}}}, "sdft": {{"all": {{"kept": 45, "known": 50}}}}}}
checks = [{{"holds": seed != 2, "check": "SDFT keeps enough"}}]
report = {{"right": right, "probes": probes, "checks": checks, "n": {{"trained": 30, "paraphrases": 60}}, "seconds": {{"whole_run": 60 * seed}}}}
(arguments.data_dir / "demo-report.json").write_text(json.dumps(report))
sys.exit(0 if seed != 2 else 1)
"""


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *seeds: int, crash: bool = True) -> int:
    script = tmp_path / "fake_demo.py"
    script.write_text(FAKE_DEMO.format(runs=str(tmp_path / "runs"), crash=crash))
    monkeypatch.setattr(demo_seeds, "DEMO", script)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["demo_seeds.py", "--out", str(tmp_path / "out"), "--seeds", *map(str, seeds)])
    return demo_seeds.main()


def test_every_seed_gets_a_row_and_the_columns_their_range(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, tmp_path, 1, 4) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| seed | base_paraphrases | sft_trained |")
    assert lines[2] == "| 1 | 2% | 90% | 50% | 78% | 60% | 90% | 82% | 98% | 90% | +20% | 1.0 |"
    assert lines[3] == "| 4 | 2% | 90% | 50% | 72% | 60% | 90% | 87% | 92% | 90% | +20% | 4.0 |"
    assert lines[4] == "| smallest | 2% | 90% | 50% | 72% | 60% | 90% | 82% | 92% | 90% | +20% | 1.0 |"
    assert lines[5] == "| largest | 2% | 90% | 50% | 78% | 60% | 90% | 87% | 98% | 90% | +20% | 4.0 |"
    assert lines[6] == "2 of 2 seeds hold every threshold"


def test_misses_and_crashes_count_and_the_rest_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, tmp_path, 3, 2, 1) == 1
    printed = capsys.readouterr().out
    assert [line[:4] for line in printed.splitlines() if line[2:3].isdigit()] == ["| 2 ", "| 1 "]
    assert "seed 3: the demo crashed" in printed
    assert "seed 2: does not hold: SDFT keeps enough" in printed
    assert "1 of 3 seeds hold every threshold" in printed
    assert (tmp_path / "out" / "seed-3.log").read_text() == "the demo of seed 3\n"
    assert (tmp_path / "out" / "seed-3-data").is_dir()
    assert not (tmp_path / "out" / "seed-1-data").exists()


def test_an_interrupted_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, tmp_path, 2, 3)
    assert run(monkeypatch, tmp_path, 1, 2, 3, crash=False) == 1  # seed 2 was not run again, and still misses
    assert (tmp_path / "runs").read_text().split() == ["2", "3", "1", "3"]
    assert json.loads((tmp_path / "out" / "seed-3.json").read_text())["right"]["sdft"]["retention"] == 47


def test_where_every_demo_crashes_there_is_no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, tmp_path, 3) == 1
    assert "|" not in capsys.readouterr().out


def test_an_interruption_lets_the_demo_stop_its_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "slow_demo.py"
    started, stopped = tmp_path / "started", tmp_path / "stopped"
    script.write_text(
        "import signal, sys, time\n"
        f"def stop(*_):\n    time.sleep(0.5)\n    open({str(stopped)!r}, 'w').close()\n    sys.exit()\n"
        f"signal.signal(signal.SIGTERM, stop)\nopen({str(started)!r}, 'w').close()\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(demo_seeds, "DEMO", script)

    def interrupt() -> None:
        deadline = time.monotonic() + 20
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        demo_seeds.run_demo(1, tmp_path / "data", tmp_path / "log")
    assert stopped.exists()
