"""The demo's side of the service: start `sdft up` as a user would, follow jobs through the stock client."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import BadRequestError, OpenAI
from openai._legacy_response import HttpxBinaryResponseContent
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

READY_TIMEOUT_SECONDS = 600
STOP_TIMEOUT_SECONDS = 60
SERVABLE_TIMEOUT_SECONDS = 120
POLL_SECONDS = 1.0
TERMINAL = ("succeeded", "failed", "cancelled")


class DemoFailed(Exception):
    """The demo can't go on; the message says why and where to look."""


@dataclass(frozen=True)
class FollowedJob:
    """A job as it was at its end, and how long it ran: from when it was first seen running, to the second."""

    job: Any
    running_seconds: float


@contextlib.contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the block's duration to `seconds[part]`."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[part] = seconds.get(part, 0.0) + time.monotonic() - start


@contextlib.contextmanager
def running_service(data_dir: Path, console: Console) -> Iterator[OpenAI]:
    """`sdft up` on a free port until the block ends. What it prints goes to a log in its data directory.

    Raises DemoFailed naming that log where the service is not ready in time.
    """
    port = _free_port()
    log_path = data_dir / "demo-sdft-up.log"
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # the log below holds the first key
    command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(data_dir), "--port", str(port)]
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            with _waiting(console) as progress:
                progress.add_task("Starting the service (usually under 60 s; the first start converts the base model, half a minute more)")
                _wait_until_ready(process, log, log_path)
            key = (data_dir / "admin.key").read_text().strip()
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, timeout=600)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_SECONDS)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_ready(process: "subprocess.Popen[str]", log: Any, log_path: Path) -> None:
    """Return once the service says that it is ready. A thread reads what it prints, from now to its end: a service that
    hangs without a word is noticed too, and its pipe never fills."""
    ready_lines: list[str] = []
    said = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # the log is closed when the demo ends
            for line in process.stdout:
                log.write(line)
                log.flush()
                if "ready" in line and "http" in line:
                    ready_lines.append(line)
                    said.set()
        said.set()

    threading.Thread(target=read, daemon=True).start()
    if not said.wait(READY_TIMEOUT_SECONDS):
        raise DemoFailed(f"the service was not ready after {READY_TIMEOUT_SECONDS} s; see {log_path}")
    if not ready_lines:
        raise DemoFailed(f"the service did not start; see {log_path}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def progress_bar(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, speed_estimate_period=120)


def _waiting(console: Console) -> Progress:
    """For a wait without steps: what is waited for and how long it has taken so far. Vanishes afterwards."""
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True)


def follow_job(client: OpenAI, job_id: str, title: str, progress: Progress, on_poll: Callable[[Any], bool] = lambda job: False) -> FollowedJob:
    """Poll a job to its end, showing steps and loss. `on_poll` is given the job about once a second while it lasts; the first
    time that it returns True the job is cancelled."""
    task = progress.add_task(title, total=None)
    seen: set[str] = set()
    running_since: float | None = None
    cancelled = False
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status == "running" and running_since is None:
            running_since = time.monotonic()
        state = (job.model_extra or {}).get("progress") or {}
        loss = ""
        for event in reversed(client.fine_tuning.jobs.list_events(job_id, limit=50).data):
            if event.type == "metrics" and isinstance(event.data, dict):
                loss = f" loss {event.data['train_loss']:.3f}"
            elif event.id not in seen:
                progress.console.print(f"  [dim]{event.message}[/dim]", highlight=False)
            seen.add(event.id)
        progress.update(task, total=state.get("total_steps"), completed=state.get("step") or 0, description=f"{title} [{job.status}]{loss}")
        if job.status in TERMINAL:
            progress.update(task, description=f"{title} [{job.status}]")
            return FollowedJob(job, 0.0 if running_since is None else time.monotonic() - running_since)
        if not cancelled and on_poll(job):
            cancelled = True
            cancel_unless_ended(client, job_id)
        time.sleep(POLL_SECONDS)


def cancel_unless_ended(client: OpenAI, job_id: str) -> None:
    """Cancel a job. One that ended by itself meanwhile stays as it is."""
    try:
        client.fine_tuning.jobs.cancel(job_id)
    except BadRequestError as error:
        if error.code != "job_already_finished":
            raise


def wait_until_servable(client: OpenAI, model: str, progress: Progress) -> None:
    """Raises DemoFailed for a model that can't be used after two minutes."""
    start, task = time.monotonic(), None
    while (client.models.retrieve(model).model_extra or {}).get("status") != "servable":
        if time.monotonic() > start + SERVABLE_TIMEOUT_SECONDS:
            raise DemoFailed(f"{model} did not become servable: its log-probabilities on the inference server could not be verified; see the job's events")
        if task is None:
            task = progress.add_task("Waiting until the model is verified and can be used (usually under 60 s)", total=None)
        time.sleep(POLL_SECONDS / 2)
    if task is not None:
        progress.remove_task(task)


def upload_demonstrations(client: OpenAI, path: Path) -> str:
    with path.open("rb") as file:
        return client.files.create(file=file, purpose="fine-tune").id


def download_adapter(client: OpenAI, model: str, destination: Path) -> int:
    """Save the PEFT adapter as a tar.gz. Returns its size in bytes."""
    client.get(f"/models/{model}/adapter?format=peft", cast_to=HttpxBinaryResponseContent).write_to_file(destination)
    return destination.stat().st_size


def save_report(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
