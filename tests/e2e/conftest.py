"""The whole service as a user starts it: `sdft up` with the real 135M model, driven by the stock client."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from tests.conftest import CACHE_DIR

EXAMPLES = Path(__file__).parents[2] / "examples" / "support_facts"
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Service:
    client: OpenAI
    data_dir: Path
    process: "subprocess.Popen[str]"

    def processes(self, *words: str) -> list[psutil.Process]:
        """The service's processes whose command line holds every one of `words`."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if str(self.data_dir) in line and all(word in line for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def wait(self, job_id: str, *statuses: str, timeout_seconds: float = 240, step: int = 0) -> Any:
        """Poll until the job has one of `statuses` (default: any terminal one) and reached `step`."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            job = self.client.fine_tuning.jobs.retrieve(job_id)
            reached = ((job.model_extra or {}).get("progress") or {}).get("step") or 0
            if job.status in (statuses or TERMINAL) and reached >= step:
                return job
            events = self.client.fine_tuning.jobs.list_events(job_id, limit=5).data
            assert job.status not in TERMINAL, (job.status, job.error, [event.message for event in events])
            assert time.monotonic() < deadline, (job.status, reached, [event.message for event in events], self.whereabouts(job_id))
            time.sleep(0.3)

    def whereabouts(self, job_id: str) -> str:
        """What the machine knows of a job that does not get on: its files, the ends of its logs, and what every process of the service does."""
        for process in self.processes("sdft_engine.train") + self.processes("celery"):
            process.send_signal(signal.SIGUSR1)  # both write what their threads are doing into their logs
        time.sleep(1)
        runs = self.data_dir / "runs" / job_id
        lines = [f"{path.relative_to(runs)}: {path.stat().st_size} bytes" for path in sorted(runs.rglob("*")) if path.is_file()]
        for log in (*runs.glob("*/trainer.log"), *runs.glob("*/control.json"), self.data_dir / "logs" / "worker.log"):
            lines += [f"== {log.name}", *log.read_text(errors="replace").splitlines()[-150:]]
        before = {process.pid: sum(process.cpu_times()[:2]) for process in self.processes()}
        time.sleep(2)
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                used = sum(process.cpu_times()[:2])
                cores = (used - before.get(process.pid, used)) / 2
                state = f"{process.status()}, {process.num_threads()} threads, {process.memory_info().rss >> 20} MiB"
                lines.append(f"{process.pid} {state}, {used:.0f} s of CPU time, now {cores:.0%} of a core: {' '.join(process.cmdline())[-120:]}")
        return "\n".join([*lines, f"load {os.getloadavg()}, {psutil.virtual_memory().available >> 20} MiB free"])

    def events(self, job_id: str) -> list[Any]:
        """All events, oldest first."""
        return list(reversed(list(self.client.fine_tuning.jobs.list_events(job_id, limit=100))))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_service(data_dir: Path, port: int, environment: dict[str, str], *words: str) -> Iterator[Service]:
    """`sdft up` with these further words, until the end of the block."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # of the tests, not of a user
        environment.pop(name, None)
    command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(data_dir), "--port", str(port), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        assert process.stdout is not None
        ready = next((line for line in process.stdout if "ready" in line), None)
        assert ready is not None, "sdft up ended without its ready line"
        assert f"http://127.0.0.1:{port}" in ready
        key = (data_dir / "admin.key").read_text().strip()
        yield Service(OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, timeout=300), data_dir, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def service(real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data_dir = tmp_path_factory.mktemp("e2e") / "data"
    port = free_port()
    environment = os.environ | {
        "SDFT_CACHE_DIR": str(CACHE_DIR),
        "SDFT_LEASE_SECONDS": "6",
        "SDFT_HEARTBEAT_SECONDS": "1",
        "SDFT_POLL_SECONDS": "1",
        "SDFT_DTYPE": "float32",  # so that what is served can be compared closely, whatever this CPU is fastest in
        "SDFT_RETENTION_PROBES": "off",  # most of a minute for each job
    }
    with running_service(data_dir, port, environment) as running:
        yield running


@pytest.fixture(scope="session")
def training_file(service: Service) -> str:
    """The demo's demonstrations."""
    return service.client.files.create(file=EXAMPLES / "demonstrations.jsonl", purpose="fine-tune").id
