"""The benchmark on real files, without a service: what passes, and what it asks of the service."""

import json
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace as Object
from typing import Any

import pytest
from rich.console import Console

from tests.examples.scripted_client import Moment, ScriptedClient, silent_progress

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo_service

from benchmarks import real_input


@pytest.fixture(autouse=True)
def _no_pause_between_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_service, "POLL_SECONDS", 0)


def step(number: int, total: int = 4, **changes: Any) -> dict[str, Any]:
    measured = {
        "train_loss": 0.5,
        "gradient_norm": 1.0,
        "valid_loss": None,
        "trained_tokens": 8 * (100 + 20),
        "completion_tokens_mean": 20.0,
        "clipped_ratio": 0.25,
        "step_seconds": 4.0,
        "rollout_seconds": 2.0,
        "teacher_seconds": 0.5,
        "student_seconds": 1.0,
        "peak_memory_bytes": 2**30,
    }
    return {"step": number, "total_steps": total, **measured, **changes}


def steps(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [step(number, len(changes), **change) for number, change in enumerate(changes, start=1)]


def test_a_complete_finite_run_of_steady_memory_passes() -> None:
    peaks = (0.5, 0.8, 1.0, 1.2)  # the first steps may hold much less than the third
    assert real_input.problems_of(steps(*({"peak_memory_bytes": int(peak * 2**30)} for peak in peaks))) == []


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (steps({}, {}, {}, {"peak_memory_bytes": int(1.21 * 2**30)}), "memory grew from 1.00 GiB at step 3 to 1.21 GiB at step 4"),
        (steps({}, {"train_loss": float("nan")}, {}, {}), "step 2: train_loss is nan"),
        (steps({}, {}, {"step_seconds": float("inf")}, {}), "step 3: step_seconds is inf"),
        (steps({}, {}, {"gradient_norm": None}, {}), "step 3: no gradient_norm"),
        (steps({}, {}, {}, {}, {})[:4], "metrics of 4 steps out of 5"),
        (steps({}, {}, {}), "3 steps are too few to see memory grow (4 are needed)"),
    ],
)
def test_what_does_not_pass(rows: list[dict[str, Any]], problem: str) -> None:
    assert real_input.problems_of(rows) == [problem]


def test_prompt_tokens_are_what_is_left_of_the_trained_tokens() -> None:
    assert real_input.prompt_tokens(step(1), 8) == 100
    assert real_input.prompt_tokens(step(1, trained_tokens=2 * 120), 2) == 100


class MeasuredClient(ScriptedClient):
    """Takes uploads, and has metrics of four steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.uploads: list[bytes] = []
        self.files = Object(create=self._upload)

    def _upload(self, *, file: Any, purpose: str) -> Object:
        assert purpose == "fine-tune"
        self.uploads.append(file[1] if isinstance(file, tuple) else file.read())
        return Object(id=f"file-{len(self.uploads)}")

    def get(self, path: str, cast_to: type) -> dict[str, Any]:
        assert path == "/fine_tuning/jobs/ftjob-1/metrics?max_points=10000"
        return {"data": steps({}, {}, {}, {})}


def demonstrations(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"messages": [], "n": number}) + "\n" for number in range(count)))
    return path


def test_a_short_file_is_trained_on_as_a_whole(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "short.jsonl", 30)
    client = MeasuredClient([Moment("running"), Moment("succeeded")])
    outcome = real_input.measure(client, path, 4, 64, silent_progress())
    assert client.uploads == [path.read_bytes()]
    assert client.created["method"]["sdft"]["hyperparameters"] == {"n_epochs": 1, "batch_size": 8, "max_completion_tokens": 64}
    assert (outcome.lines, outcome.trained_lines, len(outcome.rows), outcome.problems) == (30, 30, 4, [])


def test_of_a_long_file_the_head_is_trained_on_and_the_whole_validated(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "long.jsonl", 100)
    client = MeasuredClient([Moment("validating_files"), Moment("queued"), Moment("running")])
    real_input.measure(client, path, 4, 64, silent_progress())
    whole, head = client.uploads
    assert whole == path.read_bytes()
    assert head == b"".join(whole.splitlines(keepends=True)[:32])
    assert client.cancellations == 1


def test_a_file_that_is_refused_has_its_reason_in_the_outcome(tmp_path: Path) -> None:
    client = MeasuredClient([Moment("failed")])
    outcome = real_input.measure(client, demonstrations(tmp_path / "long.jsonl", 100), 4, 64, silent_progress())
    assert outcome.problems[0].startswith("the whole file: ")
    assert outcome.problems[1].startswith("the job failed: ")


def test_the_table_has_a_column_per_file() -> None:
    console = Console(file=StringIO(), width=240)
    measured = real_input.Outcome(Path("tools.jsonl"), 65, 32, steps({}, {}, {}, {"clipped_ratio": 0.75}))
    refused = real_input.Outcome(Path("bad.jsonl"), 9, 9, [], ["line 3 is not JSON"])
    real_input.print_outcomes([measured, refused], console)
    assert isinstance(console.file, StringIO)
    assert all(name in console.file.getvalue() for name in ("tools.jsonl", "bad.jsonl"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    _, first, second = zip(*rows, strict=True)
    assert first == ("65 (32)", "100-100", "20-20", "38%", "4/4", "4.0", "2.0 + 0.5 + 1.0 + 0.5", "1.00 to 1.00", "ok")
    assert second == ("9 (9)", *"-------", "line 3 is not JSON")


def test_too_few_steps_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["real_input.py", "--steps", "3"])
    with pytest.raises(SystemExit):
        real_input.main()
    assert "--steps must be at least 4" in capsys.readouterr().err


def test_a_missing_file_is_refused_before_the_service_starts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["real_input.py", "nowhere.jsonl"])
    with pytest.raises(SystemExit):
        real_input.main()
    assert "nowhere.jsonl is not a file" in capsys.readouterr().err
