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
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai._legacy_response import HttpxBinaryResponseContent
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

READY_TIMEOUT_SECONDS = 600
STOP_TIMEOUT_SECONDS = 60
TERMINAL = ("succeeded", "failed", "cancelled")


class DemoFailed(Exception):
    """The demo can't go on; the message says why and where to look."""


@contextlib.contextmanager
def running_service(data_dir: Path, console: Console) -> Iterator[OpenAI]:
    """`sdft up` on a free port until the block ends. Its own messages go to the terminal while it starts."""
    port = _free_port()
    log_path = data_dir / "demo-sdft-up.log"
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # the log below holds the first key
    command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(data_dir), "--port", str(port)]
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            with console.status("Starting the service (the first start converts the base model, about half a minute)"):
                _wait_until_ready(process, log, log_path)
            key = (data_dir / "admin.key").read_text().strip()
            threading.Thread(target=_drain, args=(process, log), daemon=True).start()
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, timeout=600)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_SECONDS)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(process: "subprocess.Popen[str]", log: Any, log_path: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_SECONDS
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)
        log.flush()
        if "ready" in line and "http" in line:
            return
        if time.monotonic() > deadline:
            break
    raise DemoFailed(f"the service did not start; see {log_path}")


def _drain(process: "subprocess.Popen[str]", log: Any) -> None:
    """Keep reading what the service prints, so that its pipe never fills."""
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # the log is closed when the demo ends
        for line in process.stdout:
            log.write(line)
            log.flush()


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


def follow_job(client: OpenAI, job_id: str, title: str, progress: Progress, on_poll: Callable[[], bool] = lambda: False) -> Any:
    """Poll a job to its end, showing steps and loss. `on_poll` runs once a second; where it returns True the job is cancelled."""
    task = progress.add_task(title, total=None)
    seen: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
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
            return job
        if on_poll():
            client.fine_tuning.jobs.cancel(job_id)
        time.sleep(1)


def upload_demonstrations(client: OpenAI, path: Path) -> str:
    with path.open("rb") as file:
        return client.files.create(file=file, purpose="fine-tune").id


def download_adapter(client: OpenAI, model: str, destination: Path) -> int:
    """Save the PEFT adapter as a tar.gz. Returns its size in bytes."""
    client.get(f"/models/{model}/adapter?format=peft", cast_to=HttpxBinaryResponseContent).write_to_file(destination)
    return destination.stat().st_size


def save_report(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
