"""The trainer's process group: whatever is in it, nothing is left after the block."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from core.settings import Settings
from sdft_engine.contract.run_directory import RunDirectory
from worker.trainer_process import TrainerProcess, last_log_lines

WITH_CHILDREN = """
import pathlib, subprocess, sys, time
children = [subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]) for _ in range(2)]
pathlib.Path(sys.argv[1], "children").write_text(" ".join(str(child.pid) for child in children))
{then}
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def start(run: RunDirectory, settings: Settings, program: str) -> TrainerProcess:
    return TrainerProcess((sys.executable, "-c", program), run, settings)


def wait_for_exit(trainer: TrainerProcess) -> None:
    until = time.monotonic() + 10
    while not trainer.exited():
        assert time.monotonic() < until
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def children_of(run: RunDirectory) -> list[int]:
    path = run.path / "children"
    until = time.monotonic() + 10
    while not (path.exists() and len(path.read_text().split()) == 2):
        assert time.monotonic() < until
        time.sleep(0.05)
    return [int(pid) for pid in path.read_text().split()]


def test_a_running_trainer_and_its_children_are_gone_after_the_block(run: RunDirectory, settings: Settings) -> None:
    with start(run, settings, WITH_CHILDREN.format(then="time.sleep(600)")) as trainer:
        children = children_of(run)
        assert not trainer.exited()
        assert os.getpgid(trainer.pid) == trainer.pid, "a group of its own"
    assert not any(is_running(pid) for pid in [trainer.pid, *children])
    assert trainer.describe_exit() == "killed by signal 9 (Killed)"


def test_children_that_outlive_the_trainer_are_gone_after_the_block(run: RunDirectory, settings: Settings) -> None:
    with start(run, settings, WITH_CHILDREN.format(then="sys.exit(4)")) as trainer:
        children = children_of(run)
        wait_for_exit(trainer)
        assert all(is_running(pid) for pid in children)
    assert not any(is_running(pid) for pid in children)
    assert trainer.describe_exit() == "exit status 4"


def test_an_exception_in_the_block_ends_the_trainer_too(run: RunDirectory, settings: Settings) -> None:
    with pytest.raises(KeyError), start(run, settings, "import time; time.sleep(600)") as trainer:
        raise KeyError
    assert not is_running(trainer.pid)
    trainer.end()  # idempotent


def test_a_signal_is_named(run: RunDirectory, settings: Settings) -> None:
    with start(run, settings, "import os; os.kill(os.getpid(), 11)") as trainer:
        wait_for_exit(trainer)
    assert trainer.exit_status == -signal.SIGSEGV
    assert trainer.describe_exit() == "killed by signal 11 (Segmentation fault)"


def test_the_log_holds_both_streams_and_its_end_is_short(run: RunDirectory, settings: Settings) -> None:
    program = "import sys\nfor i in range(1000): print('out', i, chr(0), flush=True)\nsys.stderr.write('the reason\\n')"
    with start(run, settings, program) as trainer:
        wait_for_exit(trainer)
    end = last_log_lines(run)
    assert end.endswith("the reason")
    assert len(end.splitlines()) == 12
    assert "\x00" not in end


def test_progress_bars_are_left_out_of_the_logs_end(run: RunDirectory) -> None:
    bars = [f"Loading weights: {done:3}%|{'█' * (done // 10):10}| {done}/100 [00:01<00:02, 92.1it/s]" for done in range(101)]
    run.log_path.write_text(
        "the first line\n"
        + "".join(f"\r{bar}" for bar in bars)
        + "\n"
        + "".join(f"\r{done}it [00:01, 9.8it/s]" for done in range(9))
        + "\nDownloading 1 of 2\rDownloading 2 of 2\r\n100% [done]\n"
        + f"\r{bars[40]}Traceback (most recent call last):\n\r{bars[41]}\r{bars[42][:30]}"
    )
    assert last_log_lines(run).splitlines() == ["the first line", "Downloading 2 of 2", "100% [done]", "Traceback (most recent call last):"]


def test_the_logs_end_is_short_where_its_lines_are_long(run: RunDirectory) -> None:
    run.log_path.write_text("x" * 100_000 + "\nthe reason\n")
    assert len(last_log_lines(run)) <= 4096
    assert last_log_lines(run).endswith("x\nthe reason")


def test_the_trainer_reads_no_modules_from_its_run_directory(run: RunDirectory, settings: Settings) -> None:
    (run.path / "json.py").write_text("raise SystemExit(9)")
    with start(run, settings, "import json, sys; sys.exit(0)") as trainer:
        wait_for_exit(trainer)
    assert trainer.exit_status == 0


def test_threads_are_limited_where_the_operator_asks_for_it(run: RunDirectory, settings: Settings) -> None:
    with start(run, settings.model_copy(update={"trainer_threads": 3}), "import os; print(os.environ['OMP_NUM_THREADS'])") as trainer:
        wait_for_exit(trainer)
    assert last_log_lines(run) == "3"
