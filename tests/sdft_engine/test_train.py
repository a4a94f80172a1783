"""sdft_engine.train without its process: what becomes of errors, and when a trainer gives up."""

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_engine import train as train_module
from sdft_engine import trainer
from sdft_engine.contract.errors import DiskFull, EngineError, NumericalError, OutOfMemory
from sdft_engine.contract.machine_clock import machine_seconds
from sdft_engine.contract.run_directory import Control, RunDirectory, TrainingResult
from sdft_engine.train import EXIT_LEASE_EXPIRED, EXIT_NOT_STARTED, Supervision, abandoned, run_training, typed


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=["python", "cuda", "system", "cpu", "c++"],
)
def test_every_lack_of_memory_is_typed_with_what_to_change(error: Exception) -> None:
    found = typed(error)
    assert isinstance(found, OutOfMemory)
    assert "batch_size" in found.message
    assert found.as_dict()["code"] == "out_of_memory"


def test_torchs_own_error_on_the_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 55)
    assert isinstance(typed(raised.value), OutOfMemory)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_typed(number: int) -> None:
    assert isinstance(typed(OSError(number, os.strerror(number))), DiskFull)


def test_any_other_error_keeps_its_name_and_the_start_of_its_text() -> None:
    found = typed(IndexError("x" * 2000))
    assert type(found) is EngineError
    assert found.message.startswith("the trainer failed with IndexError: xxx")
    assert len(found.message) < 600
    assert type(typed(PermissionError(errno.EACCES, "Permission denied"))) is EngineError


@pytest.mark.parametrize(
    ("error", "code", "param", "traced"),
    [
        (NumericalError("not finite", param="learning_rate"), "numerical_error", "learning_rate", False),
        (MemoryError(), "out_of_memory", "method", True),
    ],
)
def test_errors_of_a_run_become_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: str, param: str, traced: bool
) -> None:
    """Only what nobody foresaw needs a trace."""

    def fail(*arguments: Any) -> TrainingResult:
        raise error

    monkeypatch.setattr(trainer, "train", fail)
    run = RunDirectory(tmp_path)
    result = run_training(run, Supervision(run))
    assert result.outcome == "failed"
    assert result.error is not None
    assert (result.error["code"], result.error["param"]) == (code, param)
    assert ("Traceback" in capsys.readouterr().err) is traced


def test_a_trainer_is_abandoned_by_its_lease_or_by_its_supervisors_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)  # somebody set the machine's time of day
    now, parent = machine_seconds(), os.getppid()
    assert not abandoned(Control())
    assert not abandoned(Control(lease_deadline=now + 60, supervisor_pid=parent))
    assert not abandoned(Control(supervisor_pid=parent))
    assert abandoned(Control(lease_deadline=now - 1, supervisor_pid=parent))
    assert abandoned(Control(lease_deadline=now - 1))
    assert abandoned(Control(lease_deadline=now + 60, supervisor_pid=os.getpid()))


def test_a_supervisor_may_be_process_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: a parent with the id 1 is no sign that the supervisor died."""
    run = RunDirectory(tmp_path)
    run.write_control(Control(lease_deadline=machine_seconds() + 60, supervisor_pid=1))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(train_module, "die_with_parent", lambda: None)
    monkeypatch.setattr(Supervision, "start", lambda self: None)
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path)])
    assert train_module.main() == 0
    result = run.read_result()
    assert result is not None
    assert result.outcome == "failed"  # there is no config.json here


def test_a_trainer_that_is_abandoned_from_the_start_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    run.write_control(Control(lease_deadline=machine_seconds() - 1))
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path)])
    assert train_module.main() == EXIT_LEASE_EXPIRED
    assert [path.name for path in tmp_path.iterdir()] == ["control.json"]


@pytest.mark.parametrize(
    ("result", "out", "err"),
    [
        (TrainingResult(outcome="succeeded", final_step=8, total_steps=8), "succeeded after 8 steps: the adapter is in {run}/final\n", ""),
        (TrainingResult(outcome="stopped", stop="cancel", final_step=3, total_steps=8), "stopped (cancel) after step 3 of 8\n", ""),
        (TrainingResult(outcome="failed", error=DiskFull("no space\n  left").as_dict()), "", "failed (disk_full): no space left\n"),
    ],
    ids=["succeeded", "stopped", "failed"],
)
def test_the_end_of_a_run_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], result: TrainingResult, out: str, err: str
) -> None:
    monkeypatch.setattr(trainer, "train", lambda *arguments: result)
    monkeypatch.setattr(Supervision, "start", lambda self: None)
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path)])
    assert train_module.main() == 0
    assert RunDirectory(tmp_path).read_result() == result
    said = capsys.readouterr()
    assert (said.out, said.err) == (out.format(run=tmp_path), err)


def test_a_directory_that_does_not_exist_is_one_line_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path / "nowhere")])
    assert train_module.main() == 2
    assert capsys.readouterr().err == f"{tmp_path / 'nowhere'} is not a directory\n"
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_the_directory_holds_and_where_more_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--help"])
    with pytest.raises(SystemExit):
        train_module.main()
    said = capsys.readouterr().out
    assert [name for name in ("DIR", "config.json", "train.jsonl", "result.json", "docs/trainer.md") if name not in said] == []


class Exited(BaseException):
    pass


@pytest.mark.parametrize("content", ["{", '{"stop": "perhaps"}', '{"lease_deadline": 1.0}'])
def test_a_watch_that_can_not_read_its_orders_ends_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """It would train on past its lease otherwise."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def leave(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr(os, "_exit", leave)
    run = RunDirectory(tmp_path)
    run.control_path.write_text(content)
    with pytest.raises(Exited) as raised:
        Supervision(run, Control(lease_deadline=machine_seconds() + 60))._watch()
    assert raised.value.args == (EXIT_LEASE_EXPIRED,)


@pytest.mark.parametrize("lease", [None, 600.0])
def test_a_control_file_that_is_torn_for_a_moment_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lease: float | None) -> None:
    run = RunDirectory(tmp_path)
    run.control_path.write_text("")
    rests = iter(range(3))

    def rest(seconds: float) -> None:
        if next(rests, None) is None:
            raise Exited
        if run.control_path.read_text() == "":
            run.write_control(Control(stop="pause"))

    monkeypatch.setattr(time, "sleep", rest)
    supervision = Supervision(run, Control(lease_deadline=machine_seconds() + lease if lease else None))
    with pytest.raises(Exited):
        supervision._watch()
    assert supervision.requested() == "pause"
    assert not run.events_path.exists()


def test_without_a_supervisor_a_slip_in_the_control_file_is_said_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    run.control_path.write_text('{"stop": "cancle"}')
    rests = iter(range(20))

    def rest(seconds: float) -> None:
        if next(rests, None) is None:
            raise Exited

    monkeypatch.setattr(time, "sleep", rest)
    supervision = Supervision(run)
    with pytest.raises(Exited):
        supervision._watch()
    assert supervision.requested() is None
    (event,) = run.events_path.read_text().splitlines()
    assert "control.json can't be read, and is not obeyed" in event


def test_a_control_file_that_can_not_be_read_at_the_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "control.json").write_text('{"stop": "cancelled"}')
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path)])
    assert train_module.main() == EXIT_NOT_STARTED
    assert "control.json can't be read: stop: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["control.json"]


def test_two_trainers_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    run.result_path.write_text("of the other")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path)])
    assert train_module.main() == EXIT_NOT_STARTED
    assert capsys.readouterr().err == f"another trainer is at work in {tmp_path}\n"
    os.close(descriptor)
    assert run.result_path.read_text() == "of the other"


def test_the_result_of_an_earlier_run_is_not_left_standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    run.write_result(TrainingResult(outcome="succeeded"))
    monkeypatch.setattr(Supervision, "start", lambda self: None)
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path)])

    def crash(*arguments: Any) -> TrainingResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", crash)
    with pytest.raises(KeyboardInterrupt):
        train_module.main()
    assert run.read_result() is None


def test_a_run_that_was_told_to_stop_says_what_to_do_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    RunDirectory(tmp_path).write_control(Control(stop="pause"))
    monkeypatch.setattr(trainer, "train", lambda *arguments: TrainingResult(outcome="stopped", stop="pause", final_step=3, total_steps=8))
    monkeypatch.setattr(Supervision, "start", lambda self: None)
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path)])
    assert train_module.main() == 0
    assert capsys.readouterr().out == "stopped (pause) after step 3 of 8; to go on, remove control.json and start it again\n"


def test_orders_are_kept_and_a_signal_does_not_soften_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rest(seconds: float) -> None:
        raise Exited

    monkeypatch.setattr(time, "sleep", rest)
    run = RunDirectory(tmp_path)
    supervision = Supervision(run)
    assert supervision.requested() is None
    supervision._terminated(15, None)
    assert supervision.requested() == "requeue"
    run.write_control(Control(stop="cancel"))
    with pytest.raises(Exited):
        supervision._watch()
    assert supervision.requested() == "cancel"
    supervision._terminated(15, None)
    assert supervision.requested() == "cancel"


def test_a_pause_can_be_taken_back_and_a_signal_can_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rest(seconds: float) -> None:
        raise Exited

    monkeypatch.setattr(time, "sleep", rest)
    run = RunDirectory(tmp_path)
    run.write_control(Control(stop="pause"))
    supervision = Supervision(run, run.read_control())
    assert supervision.requested() == "pause"
    run.write_control(Control())
    with pytest.raises(Exited):
        supervision._watch()
    assert supervision.requested() is None
    supervision._terminated(15, None)
    with pytest.raises(Exited):
        supervision._watch()
    assert supervision.requested() == "requeue"


@pytest.mark.parametrize(("size", "another"), [("1", False), ("2", True)])
def test_a_connection_to_another_process_that_broke_is_no_failure_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, another: bool) -> None:
    """That other process says why it ended or, where it was killed, nobody does: a crash, after which the job is tried again."""

    def broken(*arguments: object) -> TrainingResult:
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:14001")

    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr(trainer, "train", broken)
    monkeypatch.setattr("sdft_engine.ranks.join_ranks", lambda: None)
    monkeypatch.setattr(Supervision, "start", lambda self: None)
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path)])
    assert train_module.main() == (1 if another else 0)
    assert (RunDirectory(tmp_path).read_result() is None) == another
