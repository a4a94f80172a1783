"""One child process: how it is started, whether it is ready, and how it ends.

Every child leads its own session, so that a Ctrl-C in the terminal reaches `sdft up` alone, which stops the children
in order. Its output goes to a log file of its own.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

KEPT_LOGS = 4
TAIL_LINES = 20
TAIL_BYTES = 64 * 1024
GROUP_KILL_SECONDS = 5.0
"""For processes that were killed to be gone; a GPU's driver may hold one a little longer."""


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
        """SIGTERM, and SIGKILL for its whole group after the grace; then whatever of its group outlived it is killed too. Returns
        False where it had to be killed itself."""
        if self.process is None:
            return True
        in_time = self._terminate(self.process)
        deadline = time.monotonic() + GROUP_KILL_SECONDS
        while self.kill_orphans() and time.monotonic() < deadline:
            time.sleep(0.02)
        return in_time

    def kill_orphans(self) -> int:
        """SIGKILL what is left of the group of a child that has ended, its own children say. Returns how many there still were, of
        which none may be gone yet."""
        if self.process is None or self.process.poll() is None:
            return 0
        orphans = _members_of_group(self.process.pid)
        if orphans:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return len(orphans)

    def _terminate(self, process: "subprocess.Popen[bytes]") -> bool:
        if process.poll() is not None:
            return True
        process.terminate()
        try:
            process.wait(self.spec.stop_grace_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the group's id is still its own
            process.wait()
            return False
        return True


def _members_of_group(group: int) -> list[int]:
    """Living processes of a group whose leader was reaped. While the group has members its id is given to nobody else, so a process
    with that id is another's, and the group is empty. Zombies that nobody reaps (no init in a container) have ended too."""
    members: list[int] = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except (psutil.Error, OSError):  # it ended meanwhile, or hides from us
            continue
    return [] if group in members else members


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
