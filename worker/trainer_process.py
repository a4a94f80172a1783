"""The trainer as a subprocess in a process group of its own. Leaving the block, the whole group is gone."""

import os
import re
import signal
import subprocess
import time
from collections import deque
from types import TracebackType

from core.logging import get_logger
from core.settings import Settings
from sdft_engine.contract.run_directory import RunDirectory
from worker.engine_process import engine_environment

GROUP_GONE_SECONDS = 5
LOG_LINES = 12
LOG_CHARACTERS = 4096
LOG_BYTES = 65_536
"""Of the log's end, in which those lines are looked for: progress bars between them may be long."""
PROGRESS_BAR = re.compile(r"^.*?(?:\d%\||\dit \[)[^\]]*\]?")
"""tqdm's, as `Loading weights:  40%|████      | 116/290 [00:01<00:02, 92.1it/s]` or, of unknown length, `12it [00:01, 9.8it/s]`."""

log = get_logger(__name__)


class TrainerProcess:
    """Start it from the thread that supervises it: the trainer asks to be killed when that thread ends."""

    def __init__(self, command: tuple[str, ...], run: RunDirectory, settings: Settings, variables: dict[str, str] | None = None) -> None:
        environment = engine_environment(settings) | {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"} | (variables or {})
        with run.log_path.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, str(run.path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=run.path,
                env=environment,
                start_new_session=True,
            )
        self.pid = self._process.pid
        log.info("trainer_started", pid=self.pid)

    def __enter__(self) -> "TrainerProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.end()

    def exited(self) -> bool:
        """Whether the trainer itself has ended. It is not reaped yet, so that its process group can't be another's."""
        return self._process.returncode is not None or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> None:
        """Kill whatever is left of the group and wait until it is gone. Idempotent."""
        if self._process.returncode is not None:
            return
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        until = time.monotonic() + GROUP_GONE_SECONDS
        while self._signal_group(0):
            if time.monotonic() > until:
                log.error("process_group_still_there", group=self.pid)
                return
            time.sleep(0.05)

    @property
    def exit_status(self) -> int | None:
        """As subprocess gives it: negative for a signal. None before `end`."""
        return self._process.returncode

    def describe_exit(self) -> str:
        """`exit status 1` or `killed by signal 9 (Killed)`. After `end`."""
        status = self._process.returncode
        if status < 0:
            return f"killed by signal {-status} ({signal.strsignal(-status)})"
        return f"exit status {status}"

    def _signal_group(self, number: int) -> bool:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def last_log_lines(run: RunDirectory) -> str:
    """The end of what the trainer wrote, for the person who looks at its failure: without progress bars and what a terminal
    would have overwritten."""
    with run.log_path.open("rb") as file:
        file.seek(max(0, run.log_path.stat().st_size - LOG_BYTES))
        written = file.read().decode(errors="replace").replace("\x00", "").split("\n")
    shown = (PROGRESS_BAR.sub("", line.rstrip("\r").rpartition("\r")[2]) for line in written)
    lines = deque((line for line in shown if line.strip()), maxlen=LOG_LINES)
    return "\n".join(lines)[-LOG_CHARACTERS:].strip()
