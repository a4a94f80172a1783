"""Processes that a killed `sdft up` left behind on a data directory: found by their command line, stopped in order.

A process counts only where all of this holds: it belongs to this user, it runs one of this service's programs, one of
its arguments is the data directory or a run in it, and that path is the same directory for both (a container may
have another one under the same name). A pager or an editor on a log file is left alone.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from local_stack.valkey import PROGRAMS

STOP_ORDER = {"worker": 30.0, "trainer": 10.0, "api": 5.0, "inference": 5.0, "preparation": 5.0, "valkey": 10.0}
"""Role and seconds between SIGTERM and SIGKILL; the worker first, because it has its trainers save their work."""

MODULE_ROLES = {
    "celery": "worker",
    "sdft_engine.train": "trainer",
    "uvicorn": "api",
    "inference": "inference",
    "vllm.entrypoints.openai.api_server": "inference",
    "sdft_engine.prepare_base_model": "preparation",
    "migrations": "preparation",
    "core.bootstrap": "preparation",
}
KILL_SECONDS = 5.0
POLL_SECONDS = 0.1

REQUIRED_ARGUMENT = {"worker": "worker.app", "api": "api.app:app"}


def role_of(argv: list[str], data_dir: Path) -> str | None:
    """What a process is to the service on `data_dir`; None for any other process."""
    if argv and argv[0].startswith(f"data_dir={data_dir}::"):  # vLLM's own children, which give themselves a title
        return "inference"
    if not argv or not any(_names(argument, data_dir) for argument in argv[1:]):
        return None
    if Path(argv[0]).name in PROGRAMS:
        return "valkey"
    module = argv[argv.index("-m") + 1] if "-m" in argv[1:-1] else ""
    role = MODULE_ROLES.get(module)
    required = REQUIRED_ARGUMENT.get(role or "")
    return role if required is None or required in argv else None


def _names(argument: str, data_dir: Path) -> bool:
    """Only paths that this service uses: another data directory may lie inside this one."""
    return argument in (str(data_dir), f"data_dir={data_dir}", f"{data_dir}/valkey") or argument.startswith(f"{data_dir}/runs/")


def find_leftovers(data_dir: Path) -> dict[str, list[psutil.Process]]:
    """Living processes by role, in the order in which to stop them."""
    found: dict[str, list[psutil.Process]] = {role: [] for role in STOP_ORDER}
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            role = role_of(process.cmdline(), data_dir)
            if role is not None and _sees_same_directory(process.pid, data_dir):
                found[role].append(process)
        except psutil.Error:  # it ended meanwhile, or hides from us: not ours to stop
            continue
    return {role: processes for role, processes in found.items() if processes}


def _sees_same_directory(pid: int, data_dir: Path) -> bool:
    view = Path(f"/proc/{pid}/root")
    if not view.parent.parent.joinpath("self").exists():  # no procfs (macOS), so no containers sharing our process table
        return True
    try:
        return os.path.samefile(f"{view}{data_dir}", data_dir)
    except OSError:
        return False


def stop_leftovers(data_dir: Path, say: Callable[[str], None]) -> None:
    """Stop them role by role. Looks again for each role, because a worker ends its trainers itself."""
    for role, grace_seconds in STOP_ORDER.items():
        processes = find_leftovers(data_dir).get(role, [])
        for process in processes:
            say(f"stopping the {role} (pid {process.pid}) that an earlier run left behind")
            _signal(process, signal.SIGTERM)
        for process in _still_alive(processes, grace_seconds):
            say(f"the {role} (pid {process.pid}) didn't stop within {grace_seconds:.0f} s and is killed")
            _signal(process, signal.SIGKILL)
            _still_alive([process], KILL_SECONDS)


def _still_alive(processes: list[psutil.Process], limit_seconds: float) -> list[psutil.Process]:
    """Wait for processes to end. Those that nobody reaps (no init in a container) stay zombies, and have ended too."""
    deadline = time.monotonic() + limit_seconds
    while alive := [process for process in processes if not _has_ended(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return alive


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    """SIGKILL goes to the whole group where the process leads one."""
    try:
        if number == signal.SIGKILL and not _has_ended(process) and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return
