"""One job across real processes: its spans in one trace at a collector, and its log lines under its id and its request's."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from core.database import Database
from core.projects import create_key
from core.settings import Settings
from local_stack.ports import free_local_port
from tests.fixtures.scripted_inference import ScriptedInference
from tests.rows import get_job
from tests.worker.conftest import Workshop, demonstration_file, inference, worker_settings, workshop_of  # noqa: F401

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
WITHOUT_SDK = "import sys; sys.modules['opentelemetry.sdk'] = None; "


class Collector:
    """Takes spans as an OpenTelemetry collector does: OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            (service,) = [each.value.string_value for each in resource.resource.attributes if each.key == "service.name"]
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                attributes = {each.key: each.value.string_value or each.value.int_value for each in span.attributes}
                self.spans.append(
                    {"service": service, "name": span.name, "trace": span.trace_id.hex(), "id": span.span_id.hex(), "parent": span.parent_span_id.hex()}
                    | attributes
                )

    def named(self, name: str) -> dict[str, Any]:
        (found,) = [span for span in self.spans if span["name"] == name]
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    started = Collector()
    yield started
    started.http.shutdown()
    started.http.server_close()


@pytest.fixture
def workshop(
    worker_settings: Callable[..., Settings],  # noqa: F811
    database: Database,
    database_url: str,
    tmp_path: Path,
    valkey: str,
) -> Workshop:
    settings = worker_settings(database_url=database_url, redis_url=valkey, lease_seconds=10, heartbeat_seconds=0.5, poll_seconds=0.3)
    settings.data_dir.mkdir(exist_ok=True)
    return workshop_of(settings, database, tmp_path)


class Processes:
    """An API and a worker as an operator starts them."""

    def __init__(self, workshop: Workshop, collector_url: str) -> None:
        settings = workshop.resources.settings
        self.port, self.data_dir = free_local_port(), settings.data_dir
        self.environment = os.environ | {
            "SDFT_DATA_DIR": str(settings.data_dir),
            "SDFT_CACHE_DIR": str(settings.cache_dir),
            "SDFT_BASE_MODELS": json.dumps([entry.model_dump() for entry in settings.base_models]),
            "SDFT_DATABASE_URL": settings.resolved_database_url,
            "SDFT_REDIS_URL": settings.resolved_redis_url,
            "SDFT_INFERENCE_URLS": settings.inference_urls[0],
            "SDFT_POLL_SECONDS": "0.3",
            "TRAINER_SCRIPT": str(workshop.script_path),
            "PYTHONPATH": str(ROOT),
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector_url,
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._run("api", "uvicorn", "api.app:app", "--port", str(self.port))
        worker = ("--workdir", str(self.data_dir), "-A", "tests.fixtures.scripted_worker", "worker", "--pool", "threads", "--without-mingle")
        self._run("worker", "celery", *worker)
        wait_for(self.answers)

    def _run(self, name: str, *words: str) -> None:
        with (self.data_dir / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", *words]
            self.started.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True))

    def answers(self) -> bool:
        try:
            return httpx2.get(f"http://127.0.0.1:{self.port}/healthz", trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False

    def stop(self) -> None:
        for process in self.started:
            process.terminate()
        for process in self.started:
            process.wait(40)

    def lines(self, name: str, **fields: str) -> list[dict[str, Any]]:
        """The log lines of a process that have these fields."""
        found = []
        for text in (self.data_dir / f"{name}.log").read_text().splitlines():
            if text.startswith("{"):
                line = json.loads(text)
                if all(line.get(key) == value for key, value in fields.items()):
                    found.append(line)
        return found


@pytest.fixture
def processes(workshop: Workshop, collector: Collector) -> Iterator[Processes]:
    started = Processes(workshop, collector.url)
    started.start()
    yield started
    for process in started.started:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


def test_a_job_is_one_trace_and_its_lines_are_found_by_its_id(
    workshop: Workshop,
    processes: Processes,
    collector: Collector,
    inference: ScriptedInference,  # noqa: F811
) -> None:
    with workshop.database.transaction() as session:
        key = create_key(session, workshop.project_id, "test")
    workshop.script(steps=6)
    headers = {"authorization": f"Bearer {key}", "traceparent": PARENT}
    hyperparameters = {"n_epochs": 2, "batch_size": 4}
    with httpx2.Client(base_url=f"http://127.0.0.1:{processes.port}/v1", headers=headers, trust_env=False, timeout=30) as client:
        uploaded = client.post("/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", demonstration_file())}).json()
        answer = client.post(
            "/fine_tuning/jobs",
            json={"model": "tiny", "training_file": uploaded["id"], "method": {"type": "sdft", "sdft": {"hyperparameters": hyperparameters}}},
        )
    assert answer.status_code == 200, answer.text
    job_id, request_id = answer.json()["id"], answer.headers["x-request-id"]
    wait_for(lambda: get_job(workshop.database, job_id).status in ("succeeded", "failed"))
    assert get_job(workshop.database, job_id).status == "succeeded", get_job(workshop.database, job_id).error
    processes.stop()

    created = collector.named("POST /v1/fine_tuning/jobs")
    assert (created["service"], created["trace"], created["parent"]) == ("sdft-api", TRACE_ID, PARENT.split("-")[2])
    for name in ("validate job", "train job"):
        span = collector.named(name)
        assert (span["service"], span["trace"], span["parent"], span["sdft.job_id"]) == ("sdft-worker", TRACE_ID, created["id"], job_id)
    assert (collector.named("train job")["sdft.attempt"], collector.named("train job")["sdft.outcome"]) == (1, "succeeded")
    assert not [span for span in collector.spans if "healthz" in span["name"]]

    assert [line["request_id"] for line in processes.lines("api", event="job_created", job_id=job_id)] == [request_id]
    events = {line["event"] for line in processes.lines("worker", job_id=job_id, request_id=request_id)}
    assert {"validation_started", "attempt_started", "trainer_started", "checkpoint_stored", "trainer_ended", "attempt_ended"} <= events
    assert list((processes.data_dir / "runs" / job_id / "attempt-1").glob("*.log")), "what the trainer printed lies under the job's id"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("runpy.run_module('uvicorn', run_name='__main__')", ["api.app:app", "--port", "0"]),
        ("runpy.run_module('celery', run_name='__main__')", ["-A", "worker.app", "worker", "--pool", "threads"]),
    ],
)
def test_without_the_packages_a_collector_is_refused_with_what_to_install(workshop: Workshop, program: str, words: list[str]) -> None:
    environment = Processes(workshop, "http://127.0.0.1:1").environment
    command = [sys.executable, "-c", f"{WITHOUT_SDK}import runpy; sys.argv = {['program', *words]!r}; {program}"]
    run = subprocess.run(command, env=environment, cwd=workshop.resources.settings.data_dir, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode != 0
    assert "pip install 'sdft[otel]'" in run.stderr


def test_without_a_collector_the_packages_are_not_needed(workshop: Workshop) -> None:
    environment = Processes(workshop, "").environment
    program = f"""{WITHOUT_SDK}
import asyncio
from api.app import app
async def start() -> None:
    async with app.router.lifespan_context(app):
        print(app.state.api.settings.data_dir)
asyncio.run(start())
import worker.app
print([name for name in sys.modules if name.startswith("opentelemetry.exporter")])
"""
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == f"{workshop.resources.settings.data_dir}\n[]\n"
