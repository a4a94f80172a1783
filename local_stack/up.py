"""`sdft up`: the whole service on one machine.

Prepares the base model, the database and the first key, starts Valkey, the inference server, the API and the worker,
and keeps them running until SIGINT or SIGTERM. Progress goes to standard error; standard output gets one line, with the
URL, when everything answers.
"""

import contextlib
import importlib.util
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from pydantic import SecretStr

from core.settings import Settings
from local_stack import vllm
from local_stack.commands import Stack
from local_stack.directories import directory_problem
from local_stack.environment import load_settings, unknown_variables
from local_stack.errors import StackError, StopRequested
from local_stack.leftovers import stop_leftovers
from local_stack.lock import data_directory_lock
from local_stack.ports import check_port_free, free_local_port, service_url
from local_stack.processes import rotate_log
from local_stack.supervisor import POLL_SECONDS, Supervisor

TRAINING_PACKAGES = ("torch", "transformers", "safetensors")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PREPARATION_GRACE_SECONDS = 10


def say(message: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal must not keep us from stopping the children
        print(f"sdft up: {message}", file=sys.stderr, flush=True)


def run_up(data_dir: Path | None, host: str | None, port: int | None, inference: str | None = None) -> int:
    """Run until stopped; None means: as the settings say. Returns the exit status."""
    try:
        settings = load_settings(data_dir, host, port, inference)
        for name, nearest in unknown_variables().items():
            say(f"note: {name} is no setting" + (f"; is {nearest} meant?" if nearest else ""))
        if problem := directory_problem(settings.data_dir):
            raise StackError(f"data directory {settings.data_dir}: {problem}; choose another with --data-dir")
        with _closed_to_others(settings.data_dir), data_directory_lock(settings.data_dir), _stop_signals() as stop_requested:
            _serve(settings, stop_requested)
    except StackError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {error}")
        return 1
    except StopRequested:
        say("stopped before everything was up")
    return 0


@contextlib.contextmanager
def _closed_to_others(data_dir: Path) -> Iterator[None]:
    """Makes the data directory, which nobody else may enter: its database holds webhooks' secrets, its storage training data. Nor may
    anybody else read what this process and its children write meanwhile."""
    before = os.umask(0o077)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if data_dir.stat().st_uid == os.getuid():
            data_dir.chmod(0o700)
        yield
    finally:
        os.umask(before)


def missing_training_packages() -> list[str]:
    """Looked up, not imported: this process stays small."""
    return [name for name in TRAINING_PACKAGES if importlib.util.find_spec(name) is None]


def _serve(settings: Settings, stop_requested: threading.Event) -> None:
    stop_leftovers(settings.data_dir, say)
    check_port_free(settings.host, settings.port)
    if missing := missing_training_packages():
        raise StackError(f"these packages are not installed: {', '.join(missing)}; install them with: pip install 'sdft[train]'")
    own_inference = "inference_urls" not in settings.model_fields_set
    if own_inference:
        key = settings.inference_api_key or SecretStr(secrets.token_urlsafe(32))  # other users of this machine reach its port too
        settings = settings.model_copy(update={"inference_urls": [f"http://127.0.0.1:{free_local_port()}"], "inference_api_key": key})
    stack = Stack(settings)
    if own_inference and settings.inference == "vllm":
        vllm.python_of(settings)  # said before anything is prepared
    _prepare(stack, stop_requested)
    supervisor = Supervisor(stop_requested, say)
    try:
        _launch(stack, supervisor, own_inference)
        print(f"ready: {service_url(settings.host, settings.port)}", flush=True)
        supervisor.run()
    finally:
        say("stopping, which can take a minute; a job that trains goes on from its last checkpoint at the next start")
        supervisor.stop()
        stop_leftovers(settings.data_dir, say)


def _prepare(stack: Stack, stop_requested: threading.Event) -> None:
    """Base models, database schema and API key. Every step does nothing where it was done before."""
    settings = stack.settings
    stack.logs_dir.mkdir(mode=0o700, exist_ok=True)
    for name in ("valkey", "inference", "api", "worker"):
        rotate_log(stack.logs_dir / f"{name}.log")
    settings.served_adapters_dir.mkdir(parents=True, exist_ok=True)
    _write_service_env(stack)
    for entry in settings.base_models:
        if not entry.is_prepared(settings.cache_dir):
            say(f"preparing the base model {entry.id} from {entry.source} (once)")
            _run_to_end(stack, stack.preparation(entry), f"preparing {entry.id}", stop_requested)
    _run_to_end(stack, stack.python("migrations"), "preparing the database", stop_requested)
    _run_to_end(stack, stack.python("core.bootstrap"), "making the API key", stop_requested)


def _launch(stack: Stack, supervisor: Supervisor, own_inference: bool) -> None:
    settings = stack.settings
    if settings.redis_url is None:
        supervisor.launch(stack.valkey_process())
        supervisor.wait_until_ready()
    if own_inference:
        supervisor.launch(stack.inference_process())
        where = "vLLM, which takes about a minute" if settings.inference == "vllm" else "the inference server"
        say(f"starting; {stack.served_model.id} is being loaded into {where}")
        for entry in settings.base_models[1:]:
            say(f"note: {entry.id} is prepared, but the inference server serves {stack.served_model.id} alone; set SDFT_INFERENCE_URLS for others")
    elif not stack.inference_answers():
        named = f"note: of SDFT_INFERENCE_URLS={','.join(settings.inference_urls)} not all answer, or they refuse SDFT_INFERENCE_API_KEY"
        say(f"{named}; requests go to those that do, and get a 503 while none does")
    supervisor.launch(stack.api_process())
    supervisor.launch(stack.worker_process())
    supervisor.wait_until_ready()
    if degraded := stack.readiness():
        say(f"note: not everything works yet: {', '.join(degraded)}; see {service_url(settings.host, settings.port)}/readyz")
    if settings.admin_key_path.exists():
        url = service_url(settings.host, settings.port)
        say(f"use it with: export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=$(cat {shlex.quote(str(settings.admin_key_path))})")


def _run_to_end(stack: Stack, argv: list[str], what: str, stop_requested: threading.Event) -> None:
    """Run a step that ends by itself, its output to the user. Raises StackError where it fails, StopRequested."""
    process = subprocess.Popen(
        argv, env=stack.environment, cwd=stack.settings.data_dir, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), start_new_session=True
    )
    while process.poll() is None:
        if stop_requested.wait(POLL_SECONDS):
            process.terminate()
            try:
                process.wait(PREPARATION_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise StopRequested
    if process.returncode != 0:
        raise StackError(f"{what} failed; the reason stands above")


def _write_service_env(stack: Stack) -> None:
    """What a command run by hand needs to reach this service: `set -a; . DIR/service.env`. Holds no secret."""
    stack.service_env_path.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in stack.resolved_settings.items()))
    stack.service_env_path.chmod(0o600)


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the stop signals set. One that is ignored (nohup) stays ignored."""
    stop_requested = threading.Event()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, lambda *_: stop_requested.set())
    try:
        yield stop_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
