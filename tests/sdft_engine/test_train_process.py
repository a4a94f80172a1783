"""`python -m sdft_engine.train RUN_DIR` as a process, as the worker starts it: how it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdft_engine.contract.machine_clock import machine_seconds
from sdft_engine.contract.run_directory import Control, RunDirectory, StopReason, TrainingResult
from tests.sdft_engine.runs import content_of, make_run, measured, records

pytestmark = pytest.mark.slow
START_SECONDS = 240  # for the imports, on a machine that is busy with other things
ENDLESS = {"n_epochs": 50_000, "checkpoint_every_steps": 10_000}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts trainers, and leaves none behind."""
    started: list[subprocess.Popen[bytes]] = []

    def start(run: RunDirectory) -> subprocess.Popen[bytes]:
        with run.log_path.open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "sdft_engine.train", str(run.path)], stdout=log, stderr=log, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for_steps(run: RunDirectory, steps: int) -> None:
    until = time.monotonic() + START_SECONDS
    while not run.metrics_path.exists() or run.metrics_path.read_bytes().count(b"\n") < steps:
        assert time.monotonic() < until, run.log_path.read_text()
        assert run.read_result() is None, run.log_path.read_text()
        time.sleep(0.05)


def result_of(run: RunDirectory) -> TrainingResult:
    result = run.read_result()
    assert result is not None, run.log_path.read_text()
    return result


def control(stop: StopReason | None = None, lease_seconds: float = 600) -> Control:
    return Control(lease_deadline=machine_seconds() + lease_seconds, supervisor_pid=os.getpid(), stop=stop)


def test_a_whole_run_succeeds_with_nothing_but_its_directory(tmp_path: Path, tiny_model_dir: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    assert start(run).wait(START_SECONDS) == 0
    result = result_of(run)
    assert (result.outcome, result.stop, result.final_step, result.total_steps, result.error) == ("succeeded", None, 8, 8, None)
    assert result.trained_tokens == sum(record["trained_tokens"] for record in records(run.metrics_path))
    assert (run.final_dir / "adapter_model.safetensors").exists()
    assert run.log_path.read_text() == f"succeeded after 8 steps: the adapter is in {run.final_dir}\n"


def test_sigterm_lets_the_step_end_and_leaves_a_checkpoint(tmp_path: Path, tiny_model_dir: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, **ENDLESS)
    run.write_control(control())
    process = start(run)
    wait_for_steps(run, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    result = result_of(run)
    assert (result.outcome, result.stop) == ("stopped", "requeue")
    assert [step for step, _ in run.complete_checkpoints()] == [result.final_step] == [len(records(run.metrics_path))]


def test_asked_by_a_signal_it_writes_what_its_threads_do_and_goes_on(
    tmp_path: Path, tiny_model_dir: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, **ENDLESS)
    process = start(run)
    wait_for_steps(run, 1)
    process.send_signal(signal.SIGUSR1)
    wait_for_steps(run, len(records(run.metrics_path)) + 2)
    assert re.search(r"Current thread .*File .*sdft_engine/trainer.py", run.log_path.read_text(), re.DOTALL)


@pytest.mark.parametrize(("reason", "checkpoints"), [("cancel", 0), ("pause", 1)])
def test_a_stop_in_the_control_file_is_obeyed(
    tmp_path: Path, tiny_model_dir: Path, start: Callable[..., subprocess.Popen[bytes]], reason: StopReason, checkpoints: int
) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised", **ENDLESS)
    run.write_control(control())
    process = start(run)
    wait_for_steps(run, 1)
    run.write_control(control(reason))
    assert process.wait(60) == 0
    result = result_of(run)
    assert (result.outcome, result.stop) == ("stopped", reason)
    assert len(run.complete_checkpoints()) == checkpoints


def test_past_its_lease_a_trainer_ends_and_writes_nothing(tmp_path: Path, tiny_model_dir: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, **ENDLESS)
    run.write_control(control())
    process = start(run)
    wait_for_steps(run, 1)
    assert process.poll() is None
    run.write_control(control(lease_seconds=0))
    assert process.wait(10) == 75
    assert run.read_result() is None
    assert run.complete_checkpoints() == []


SUPERVISOR = """
import os, subprocess, sys
from pathlib import Path
from sdft_engine.contract.machine_clock import machine_seconds
from sdft_engine.contract.run_directory import Control, RunDirectory
run = RunDirectory(Path(sys.argv[1]))
run.write_control(Control(lease_deadline=machine_seconds() + 600, supervisor_pid=os.getpid()))
with run.log_path.open("ab") as log:
    process = subprocess.Popen([sys.executable, "-m", *sys.argv[2:], str(run.path)], stdout=log, stderr=log, start_new_session=True)
print(process.pid, flush=True)
process.wait()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_trainer_dies_with_its_supervisor(tmp_path: Path, tiny_model_dir: Path, stopped: bool) -> None:
    """Even one that is stopped, and could not notice by itself."""
    run = make_run(tmp_path / "run", tiny_model_dir, **ENDLESS)
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(run.path), "sdft_engine.train"], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        trainer = psutil.Process(int(supervisor.stdout.readline()))
        try:
            wait_for_steps(run, 1)
            if stopped:
                trainer.suspend()
            supervisor.kill()
            supervisor.wait()
            until = time.monotonic() + 30
            while trainer.is_running() and trainer.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            supervisor.kill()
            if trainer.is_running():
                trainer.kill()
    assert run.read_result() is None


@pytest.mark.slow
def test_several_processes_die_with_their_supervisor(tmp_path: Path, tiny_model_dir: Path) -> None:
    """torchrun makes no such request of its own, and its processes are not the supervisor's children."""
    run = make_run(tmp_path / "run", tiny_model_dir, **ENDLESS)
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(run.path), "sdft_engine.launch", "2"], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        torchrun = psutil.Process(int(supervisor.stdout.readline()))
        try:
            wait_for_steps(run, 1)
            processes = [torchrun, *torchrun.children(recursive=True)]
            assert sum("sdft_engine.train" in process.cmdline() for process in processes) >= 2
            supervisor.kill()
            supervisor.wait()
            _, alive = psutil.wait_procs(processes, timeout=30)
            assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
        finally:
            supervisor.kill()
            if torchrun.is_running():
                os.killpg(torchrun.pid, signal.SIGKILL)
    assert run.read_result() is None


@pytest.mark.slow
def test_several_processes_obey_a_pause_and_the_lease_s_end(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, **ENDLESS)
    orders: list[tuple[StopReason | None, float]] = [("pause", 600), (None, 0)]
    for stop, lease_seconds in orders:
        run.write_control(control())
        command = [sys.executable, "-m", "sdft_engine.launch", "2", str(run.path)]
        with run.log_path.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for_steps(run, 1)
            run.write_control(control(stop, lease_seconds))
            status = process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result = run.read_result()
        if stop is None:
            assert (status != 0, result) == (True, None)
        else:
            assert result is not None
            assert (status, result.outcome, result.stop) == (0, "stopped", "pause")
            assert [step for step, _ in run.complete_checkpoints()] == [result.final_step]
            run.metrics_path.unlink()
            run.result_path.unlink()


def test_a_configuration_that_can_not_be_read_is_a_typed_failure(tmp_path: Path, tiny_model_dir: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    run.config_path.write_text(run.config_path.read_text().replace('"method":"sdft"', '"method":"magic"'))
    assert start(run).wait(START_SECONDS) == 0
    result = result_of(run)
    assert result.outcome == "failed"
    assert result.error is not None
    assert result.error["code"] == "invalid_configuration"
    assert "method" in result.error["message"]
    (line,) = run.log_path.read_text().splitlines()
    assert line == f"failed (invalid_configuration): {result.error['message']}"


@pytest.mark.parametrize(("name", "ours"), [("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "2000")])
def test_idle_threads_of_a_trainer_soon_sleep_whoever_starts_it(name: str, ours: str) -> None:
    """Set before torch starts its threads; what an operator has set stays."""
    program = f"import sys, sdft_engine.train; assert 'torch' not in sys.modules; import os; print(os.environ['{name}'])"
    for given, expected in ((None, ours), ("7", "7")):
        environment = {key: value for key, value in os.environ.items() if key != name} | ({name: given} if given else {})
        shown = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
        assert shown.strip() == expected


@pytest.mark.timeout(900)
def test_a_process_that_is_killed_and_another_that_goes_on_leave_the_same(
    tmp_path: Path, tiny_model_dir: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """SIGKILL, wherever it strikes; two threads."""
    settings: dict[str, Any] = {"n_epochs": 40, "checkpoint_every_steps": 6, "config": {"threads": 2}}
    killed, whole = (make_run(tmp_path / name, tiny_model_dir, **settings) for name in ("killed", "whole"))
    for steps in (8, 30, 55):
        process = start(killed)
        wait_for_steps(killed, steps)
        process.kill()
        process.wait()
    for run in (killed, whole):
        assert start(run).wait(START_SECONDS) == 0
        assert result_of(run).outcome == "succeeded"
    assert measured(killed) == measured(whole)
    assert content_of(killed.final_dir) == content_of(whole.final_dir)
