"""A whole deployment of real processes, each of which a test can kill, freeze and start again; and what must hold when all is over.

API under uvicorn, Celery workers, their trainers, an inference server with the tiny model, Valkey, and SQLite or a real Postgres.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI
from sqlalchemy import select

from core.database import Database
from core.doorbell import Doorbell, celery_application
from core.inference_servers import InferenceServers
from core.object_storage import open_storage
from core.settings import Settings
from core.tables.exports import ModelExport
from core.tables.files import File
from core.tables.jobs import TERMINAL_STATUSES, Checkpoint, Job, JobEvent, JobMetrics
from core.tables.models import Model
from inference.adapter_uploads import LOCK_NAME
from local_stack.commands import Stack
from local_stack.processes import Child, ProcessSpec
from tests.rows import assert_all_sound
from worker import garbage_collection, old_directories
from worker.garbage_collection import Collector
from worker.resources import Resources
from worker.stored_objects import OBJECT_PREFIXES

ROOT = Path(__file__).parents[2]
"""For PYTHONPATH, where a process is one of tests/fixtures."""
BASE = "tiny"
LINES = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"Which lamp is lamp {n}?"}, {"role": "assistant", "content": f"Lamp {n} is red."}]}).encode() + b"\n"
    for n in range(12)
)
HYPERPARAMETERS = {
    "n_epochs": 50,
    "batch_size": 2,
    "lora_rank": 4,
    "checkpoint_every_steps": 25,
    "max_completion_tokens": 8,
    "temperature": 1.0,
    "mask_clipped_completions": False,
}
"""300 steps of some hundredths of a second."""
UNDISTURBED_LOSSES: list[tuple[int, float]] = []


@dataclass
class Deployment:
    """`settings` are complete; `environment` is what processes get beside them."""

    settings: Settings
    environment: dict[str, str]
    children: dict[str, Child] = field(default_factory=dict)
    leaves_something: bool = False
    """Whether the fault keeps a process from tidying up after itself: a kill, a disk or a bucket that fails. Else nothing may be left."""

    def __post_init__(self) -> None:
        self.stack = Stack(self.settings)
        self.stack.logs_dir.mkdir(parents=True, exist_ok=True)
        self.settings.served_adapters_dir.mkdir(parents=True, exist_ok=True)
        self.stack.service_env_path.touch()
        self.database = Database(self.settings.resolved_database_url)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.settings.admin_key_path.read_text().strip(), timeout=60, max_retries=0)

    def start(self, *names: str, application: str | None = None, **variables: str) -> None:
        """Start `valkey`, `inference`, `api`, `worker` or further ones (`worker2`, `inference2` at the second of the inference servers' URLs),
        and wait until they are ready."""
        for name in names:
            self.launch(name, application, variables)
        for name in names:
            wait_for(self.children[name].spec.is_ready, 120, lambda name=name: self.log_of(name))  # type: ignore[misc]

    def launch(self, name: str, application: str | None, variables: dict[str, str]) -> None:
        """`application`: another module in place of `api.app:app` or `worker.app`."""
        kind = name.rstrip("0123456789")
        number = int(name.removeprefix(kind) or 1)
        stack = self.stack
        if kind == "inference":
            stack = Stack(self.settings.model_copy(update={"inference_urls": self.settings.inference_urls[number - 1 :]}))
        spec: ProcessSpec = getattr(stack, f"{kind}_process")()
        argv = [word.replace(self.stack.worker_name, f"{name}-{self.stack.worker_name}") if number > 1 else word for word in spec.argv]
        argv = [application if application and word in ("api.app:app", "worker.app") else word for word in argv]
        is_ready = spec.is_ready if number == 1 or kind == "inference" else lambda: "ready." in self.log_of(name)
        environment = {**spec.environment, **self.environment, **variables}
        child = Child(replace(spec, argv=argv, environment=environment, log_path=self.stack.logs_dir / f"{name}.log", is_ready=is_ready))
        child.start()
        self.children[name] = child

    def signal(self, name: str, number: int) -> None:
        process = self.children[name].process
        assert process is not None
        os.kill(process.pid, number)

    def kill(self, name: str) -> None:
        """SIGKILL to the process itself, whose children stay."""
        self.leaves_something = True
        self.signal(name, signal.SIGKILL)
        self.ended(name)

    def ended(self, name: str, seconds: float = 40) -> int:
        """Its exit status, once it has ended."""
        process = self.children[name].process
        assert process is not None
        return process.wait(seconds)

    def log_of(self, name: str) -> str:
        path = self.stack.logs_dir / f"{name}.log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else ""

    def trainers(self, job_id: str = "sdft_engine.train") -> list[psutil.Process]:
        """Living trainers, of one job or of all."""
        return [process for process in self.processes() if "sdft_engine.train" in process.cmdline() and job_id in " ".join(process.cmdline())]

    def processes(self) -> list[psutil.Process]:
        """Everything of this deployment that lives, found by the data directory in its command line."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            if str(self.settings.data_dir) in " ".join(process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def upload(self) -> str:
        return self.client.files.create(file=("lamps.jsonl", LINES), purpose="fine-tune").id

    def create_job(self, training_file: str | None = None, seed: int = 7, **hyperparameters: Any) -> str:
        method: Any = {"type": "sdft", "sdft": {"hyperparameters": HYPERPARAMETERS | hyperparameters}}
        created = self.client.fine_tuning.jobs.create(model=BASE, training_file=training_file or self.upload(), seed=seed, method=method)
        return created.id

    def job(self, job_id: str) -> Job:
        with self.database.reading() as session:
            return session.get_one(Job, job_id)

    def wait_for_step(self, job_id: str, step: int) -> None:
        wait_for(lambda: (self.job(job_id).step or 0) >= step, 120, lambda: self.story(job_id))

    def wait_for_checkpoint(self, job_id: str) -> None:
        """Until one is stored, which may be a little after its step was told of."""

        def is_stored() -> bool:
            with self.database.reading() as session:
                return session.scalar(select(Checkpoint.step).where(Checkpoint.job_id == job_id, Checkpoint.storage_key.is_not(None)).limit(1)) is not None

        wait_for(is_stored, 120, lambda: self.story(job_id))

    def wait_for_end(self, job_id: str, status: str = "succeeded", seconds: float = 180) -> Job:
        wait_for(lambda: self.job(job_id).status in TERMINAL_STATUSES, seconds, lambda: self.story(job_id))
        job = self.job(job_id)
        assert job.status == status, (job.error, self.story(job_id))
        return job

    def messages(self, job_id: str) -> list[str]:
        with self.database.reading() as session:
            return list(session.scalars(select(JobEvent.message).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)))

    def losses(self, job_id: str) -> list[tuple[int, float]]:
        """Step and training loss, in order."""
        with self.database.reading() as session:
            rows = session.scalars(select(JobMetrics).where(JobMetrics.job_id == job_id).order_by(JobMetrics.step)).all()
        return [(row.step, row.metrics["train_loss"]) for row in rows]

    def undisturbed_losses(self, file_id: str) -> list[tuple[int, float]]:
        """Of a job that nothing happened to: trained once for all tests, since training is exact and their files are the same."""
        if not UNDISTURBED_LOSSES:
            job_id = self.create_job(file_id)
            self.wait_for_end(job_id)
            UNDISTURBED_LOSSES.extend(self.losses(job_id))
        return UNDISTURBED_LOSSES

    def story(self, job_id: str) -> str:
        job = self.job(job_id)
        return f"{job.status}, step {job.step}, attempt {job.attempt}: {self.messages(job_id)}\n{self.log_of('worker')[-3000:]}"

    def stop(self) -> None:
        """All processes, as an operator stops them: workers first."""
        self.stop_workers()
        for name in self.children:
            self._stop(name)
        self.database.close()

    def stop_workers(self) -> None:
        for name in self.children:
            if name.startswith("worker"):
                self._stop(name)

    def _stop(self, name: str) -> None:
        child = self.children[name]
        if child.alive:
            self.signal(name, signal.SIGCONT)
            child.stop()

    def collect(self) -> None:
        """What a worker does after a day, at once: remove what processes that were killed left in storage."""
        resources = Resources(
            self.settings, self.database, open_storage(self.settings), InferenceServers(self.settings), Doorbell(celery_application(self.settings))
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(garbage_collection, "GRACE_SECONDS", 0.0)
            patch.setattr(old_directories, "ABANDONED_SECONDS", 0.0)
            Collector(resources).collect()

    def assert_sound(self) -> None:
        """What must hold once all jobs have ended or wait and nothing runs but the servers."""
        assert self.trainers() == [], "orphans"
        self.stop_workers()  # which may be unpacking checkpoints, to verify their models
        if not self.leaves_something:
            self._assert_no_object_without_a_row()
            self._assert_nothing_temporary()
        self.collect()
        with self.database.reading() as session:
            projects = set(session.scalars(select(Job.project_id)))
        for project_id in projects:
            assert_all_sound(self.database, project_id)
        self._assert_steps_are_whole()
        stored, named = self._assert_no_object_without_a_row()
        assert named - stored == set(), "rows without their object"
        self._assert_nothing_temporary()

    def _assert_steps_are_whole(self) -> None:
        with self.database.reading() as session:
            jobs = session.scalars(select(Job).where(Job.status == "succeeded")).all()
            for job in jobs:
                steps = session.scalars(select(JobMetrics.step).where(JobMetrics.job_id == job.id).order_by(JobMetrics.step)).all()
                assert steps == list(range(1, (job.total_steps or 0) + 1)), job.id
                attempts = session.scalars(select(JobMetrics.attempt).where(JobMetrics.job_id == job.id).order_by(JobMetrics.step)).all()
                assert attempts == sorted(attempts), "a stale attempt wrote after a newer one"

    def _assert_no_object_without_a_row(self) -> tuple[set[str], set[str]]:
        """The keys in storage, and those that rows name."""
        storage = open_storage(self.settings)
        stored = {found.key for prefix in OBJECT_PREFIXES for page in storage.list_objects(prefix) for found in page}
        with self.database.reading() as session:
            columns = (File.storage_key, Checkpoint.storage_key, ModelExport.storage_key)
            named = {key for column in columns for key in session.scalars(select(column)) if key is not None}
            named |= set(session.scalars(select(Model.storage_key).where(Model.status != "deleted")))
        assert stored - named == set(), "objects without a row"
        return stored, named

    def _assert_nothing_temporary(self) -> None:
        """What is written under another name first has one that begins with a dot, or is in such a directory. A lock's stays."""
        lock = self.settings.uploaded_adapters_dir / LOCK_NAME
        paths = (path.relative_to(self.settings.data_dir) for path in self.settings.data_dir.rglob("*") if path.is_file() and path != lock)
        assert [path for path in paths if any(part.startswith(".") for part in path.parts)] == [], "temporary files"


def wait_for(condition: Callable[[], bool], seconds: float, told: Callable[[], str] = lambda: "") -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, told()
        time.sleep(0.05)
