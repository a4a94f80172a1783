"""What every process of the engine that this worker starts has in common."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from core.child_environment import child_environment
from core.settings import Settings

POLL_SECONDS = 0.2
SAMPLER_KEY = "SAMPLER_API_KEY"
"""The variable in which a trainer finds the inference server's key."""


def engine_environment(settings: Settings) -> dict[str, str]:
    """Of the worker's own environment what says where things are and how to compute: no settings, keys or tokens."""
    kept = child_environment(os.environ) | {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
    if settings.training_slots > 1:
        kept.setdefault("GOMP_SPINCOUNT", "0")  # trainers side by side: a thread that waits for work takes the other's core
    if settings.trainer_threads:
        kept["OMP_NUM_THREADS"] = str(settings.trainer_threads)
    return kept


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status as subprocess gives it, and all it wrote."""

    status: int
    output: str


def downloading_environment(settings: Settings) -> dict[str, str]:
    """For what fetches base models: a hub's token and proxies too, and whatever else the operator gave, without the service's own."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("SDFT_", "AWS_"))}
    return given | engine_environment(settings)


def run_to_end(command: list[str], environment: dict[str, str], check: Callable[[], None]) -> Ended:
    """Run one of the engine's commands in a process group of its own. `check` is called all the while and may raise: the group is
    killed then."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            while process.poll() is None:
                check()
                try:
                    process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Ended(process.returncode, output.read().decode(errors="replace").strip())
