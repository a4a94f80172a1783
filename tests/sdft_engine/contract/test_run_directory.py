import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.run_directory import Control, RunDirectory, TrainingResult, append_line, write_atomically


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_control_is_read_as_it_was_written(run: RunDirectory) -> None:
    assert run.read_control() == Control(lease_deadline=None, stop=None)
    for control in (Control(lease_deadline=1e9 + 0.25), Control(stop="cancel"), Control(lease_deadline=5.0, stop="requeue"), Control()):
        run.write_control(control)
        assert run.read_control() == control
    assert os.listdir(run.path) == ["control.json"]


def test_unknown_stop_is_refused() -> None:
    with pytest.raises(ValidationError):
        Control.model_validate({"stop": "explode"})


def test_result_is_read_as_it_was_written(run: RunDirectory) -> None:
    assert run.read_result() is None
    result = TrainingResult(outcome="failed", final_step=3, error={"code": "out_of_memory", "message": "ü", "param": None})
    run.write_result(result)
    assert run.read_result() == result


def test_reader_never_sees_half_a_control_file(run: RunDirectory) -> None:
    """Several threads write (the heartbeat and a shutdown), one reads at every step."""
    run.write_control(Control(lease_deadline=0.0))
    errors: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(100):
                run.write_control(Control(lease_deadline=number + 1e9, stop="cancel" if number else None))
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        control = run.read_control()
        assert control.lease_deadline == 0.0 or (control.stop is None) == (control.lease_deadline == 1e9)
    assert errors == []
    assert os.listdir(run.path) == ["control.json"]


def test_failed_write_keeps_the_old_content_and_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["result.json"]


def append_many(path: Path, word: str) -> None:
    for _ in range(300):
        append_line(path, word * 200)


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    processes = [multiprocessing.get_context("spawn").Process(target=append_many, args=(path, word)) for word in ("ab", "cd")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    lines = path.read_text().splitlines()
    assert sorted(set(lines)) == ["ab" * 200, "cd" * 200]
    assert len(lines) == 600


def test_line_is_there_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, '{"step": 1}')
    assert path.read_bytes() == b'{"step": 1}\n'
    with path.open("ab") as file:  # a trainer killed in the middle of a line
        file.write(b'{"step": 2, "trai')
    complete = path.read_bytes().rpartition(b"\n")[0].splitlines()
    assert [json.loads(line) for line in complete] == [{"step": 1}]


def test_events_are_one_line_each_whatever_they_say(run: RunDirectory) -> None:
    run.append_event("two\nlines and ü\u2028", level="warn", data={"step": 1})
    run.append_event("plain")
    first, second = (json.loads(line) for line in run.events_path.read_bytes().splitlines())
    assert (first["level"], first["message"], first["data"]) == ("warn", "two\nlines and ü\u2028", {"step": 1})
    assert (second["level"], "data" in second) == ("info", False)
    assert first["created_at"] <= second["created_at"]


def test_only_checkpoints_under_their_final_names_count(run: RunDirectory) -> None:
    assert run.complete_checkpoints() == []
    for name in ("step_000100", "step_000005", "step_1000000", ".step_000200.tmp", "step_000300.tmp", "step_", "other"):
        (run.checkpoints_dir / name).mkdir(parents=True)
    assert run.complete_checkpoints() == [(step, run.checkpoint_dir(step)) for step in (5, 100, 1_000_000)]


def test_every_path_lies_in_the_run_directory(run: RunDirectory) -> None:
    paths = [value for name in dir(RunDirectory) if name.endswith(("_path", "_dir")) and isinstance(value := getattr(run, name), Path)]
    assert len(set(paths)) == len(paths) == 14
    assert {path.parent for path in paths} == {run.path}


def test_metrics_refuse_what_json_can_not_hold() -> None:
    values = {name: 1 for name, field in StepMetrics.model_fields.items() if field.is_required()}
    assert StepMetrics.model_validate(values).divergence_max is None
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValidationError):
            StepMetrics.model_validate(values | {"train_loss": value})


def test_a_line_that_was_cut_off_stays_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"step": 1}\n{"st')
    append_line(path, '{"step": 2}')
    append_line(path, '{"step": 3}')
    assert path.read_bytes().splitlines() == [b'{"step": 1}', b'{"st', b'{"step": 2}', b'{"step": 3}']


@pytest.mark.parametrize("name", ["step_\u00b2", "step_12", "step_", "step_0000-1", "step_000001.tmp", "xstep_000001"])
def test_other_names_are_no_checkpoints(run: RunDirectory, name: str) -> None:
    (run.checkpoints_dir / name).mkdir(parents=True)
    assert run.complete_checkpoints() == []
