"""One child process: how it is started, whether it is ready, and how it ends.

Every child leads its own session, so that a Ctrl-C in the terminal reaches `sdft up` alone, which stops the children
in order. Its output goes to a log file of its own.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

KEPT_LOGS = 4
TAIL_LINES = 20
TAIL_BYTES = 64 * 1024


@dataclass(frozen=True)
class ProcessSpec:
    """What to run. `argv` names the data directory, so that a later start finds the process if this one is killed."""

    name: str
    argv: list[str]
    environment: dict[str, str]
    working_dir: Path
    log_path: Path
    is_ready: Callable[[], bool]
    """Asks the process itself; called only while it lives."""
    start_limit_seconds: float
    stop_grace_seconds: float
    """Between SIGTERM and SIGKILL."""


@dataclass
class Child:
    spec: ProcessSpec
    process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    started_at: float = field(default=0.0, init=False)
    """Monotonic clock, seconds."""

    def start(self) -> None:
        """Raises OSError where the program can't be run."""
        with self.spec.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.spec.argv,
                env=self.spec.environment,
                cwd=self.spec.working_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started_at = time.monotonic()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self.process is None else self.process.poll()

    def stop(self) -> bool:
        """SIGTERM, and SIGKILL for its whole group after the grace. Returns False where it had to be killed."""
        if self.process is None or self.process.poll() is not None:
            return True
        self.process.terminate()
        try:
            self.process.wait(self.spec.stop_grace_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # not reaped yet, so the group's id is still its own
            self.process.wait()
            return False
        return True


def describe_exit(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def rotate_log(path: Path) -> None:
    """Put the log of the last start aside, as `<name>.1`; older ones move on, and the oldest goes."""
    if not path.exists() or path.stat().st_size == 0:
        return
    for number in range(KEPT_LOGS, 0, -1):
        older = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
        if older.exists():
            older.replace(path.with_name(f"{path.name}.{number}"))


def tail(path: Path) -> str:
    """The last lines of a log."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
