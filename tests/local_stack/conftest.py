import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from local_stack.processes import ProcessSpec


def wait_for(condition: Callable[[], object], limit_seconds: float = 20) -> None:
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition didn't come true in time"
        time.sleep(0.02)


def processes_naming(data_dir: Path) -> list[psutil.Process]:
    """Every living process with the directory anywhere in its command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(data_dir) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data directory; whatever still names it in its command line at the end is killed."""
    directory = tmp_path / "data"
    directory.mkdir()
    yield directory
    for process in processes_naming(directory):
        os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def scripted(tmp_path: Path) -> Callable[..., ProcessSpec]:
    """A spec for a small Python program. By default it counts as ready once it has made the file `<name>.ready`; the
    prelude gives programs `ready()` and `note(word)`, which appends a line to `notes`."""

    def make(name: str, program: str, *, grace: float = 5, is_ready: Callable[[], bool] | None = None, start_limit: float = 20) -> ProcessSpec:
        ready_file = tmp_path / f"{name}.ready"
        prelude = f"""
import os, signal, sys, time
def ready(): open({str(ready_file)!r}, "w").close()
def note(word): open({str(tmp_path / "notes")!r}, "a").write(word + "\\n")
def on_term(handler): signal.signal(signal.SIGTERM, lambda *_: handler())
"""
        argv = [sys.executable, "-c", prelude + program]
        return ProcessSpec(name, argv, dict(os.environ), tmp_path, tmp_path / f"{name}.log", is_ready or ready_file.exists, start_limit, grace)

    return make


@pytest.fixture
def notes(tmp_path: Path) -> Callable[[], list[str]]:
    path = tmp_path / "notes"
    return lambda: path.read_text().split() if path.exists() else []


@pytest.fixture
def start_process() -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Start a process that is killed at the end of the test, with its group."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*argv: str | Path, **options: object) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen([str(word) for word in argv], start_new_session=True, **options)  # type: ignore[call-overload]
        started.append(process)
        return process  # type: ignore[no-any-return]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
