"""A worker's resources around a real database, real storage, a scripted trainer and a scripted inference server."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.database import Database, unix_now
from core.doorbell import Doorbell, celery_application
from core.ids import new_id, new_token
from core.inference_servers import InferenceServers
from core.settings import Settings
from core.storage import LocalStorage
from core.tables.files import File
from sdft_engine.contract.hyperparameters import ResolvedSdft
from tests.fixtures.scripted_inference import ScriptedInference
from tests.rows import add_job, add_project
from worker.resources import Resources

ROWS = 12
SCRIPTED_TRAINER = Path(__file__).parents[1] / "fixtures" / "scripted_trainer.py"
RESOLVED = ResolvedSdft(
    n_epochs=4,
    batch_size=4,
    learning_rate=1e-3,
    lora_rank=4,
    lora_alpha=8,
    warmup_ratio=0.1,
    checkpoint_every_steps=4,
    max_completion_tokens=16,
    divergence="forward",
    estimator="full",
    teacher="ema",
    ema_rate=0.02,
    teacher_start="parent",
    temperature="auto",
    skip_first_tokens=3,
    mask_clipped_completions=True,
    over_length="reject",
).model_dump()


def demonstration_line(question: str, answer: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}).encode()


def demonstration_file(rows: int = ROWS) -> bytes:
    return b"\n".join(demonstration_line(f"Which lamp is lamp {number}?", f"Lamp {number} is red.") for number in range(rows)) + b"\n"


@dataclass
class Workshop:
    """Everything that a test of the worker touches."""

    resources: Resources
    project_id: str
    script_path: Path

    @property
    def database(self) -> Database:
        return self.resources.database

    def script(self, **values: Any) -> None:
        """What the scripted trainer does: see tests/fixtures/scripted_trainer.py."""
        self.script_path.write_text(json.dumps({"steps": 12, "step_seconds": 0.01, "checkpoint_every": 4} | values))

    def add_file(self, content: bytes | None = None) -> str:
        key = f"files/{new_token()}"
        writer = self.resources.storage.open_writer(key)
        writer.write(demonstration_file() if content is None else content)
        stored = writer.commit()
        file_id = new_id("file")
        with self.database.transaction() as session:
            session.add(
                File(
                    id=file_id,
                    project_id=self.project_id,
                    filename="train.jsonl",
                    purpose="fine-tune",
                    size_bytes=stored.size_bytes,
                    sha256=stored.sha256,
                    storage_key=key,
                    created_at=unix_now(),
                )
            )
        return file_id

    def add_job(self, status: str = "queued", content: bytes | None = None, method: dict[str, Any] | None = None, **columns: Any) -> str:
        """A job over a file of its own. Queued: as validation leaves it."""
        defaults: dict[str, Any] = {"training_file_id": self.add_file(content), "method": method or {"type": "sdft", "sdft": {"hyperparameters": {}}}}
        if status != "validating_files":
            defaults |= {"resolved_hyperparameters": RESOLVED, "total_steps": 12}
        return add_job(self.database, self.project_id, status, **(defaults | columns))


@pytest.fixture
def inference() -> Iterator[ScriptedInference]:
    server = ScriptedInference("tiny")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def worker_settings(make_settings: Callable[..., Settings], tiny_model_dir: Path, inference: ScriptedInference) -> Callable[..., Settings]:
    """Settings with one prepared base model, the scripted inference server, and a broker that does not exist."""

    def make(**overrides: Any) -> Settings:
        settings = make_settings(**({"base_models": [{"id": "tiny", "source": str(tiny_model_dir)}], "inference_urls": [inference.url]} | overrides))
        prepared = settings.base_models[0].directory(settings.cache_dir)
        prepared.parent.mkdir(parents=True, exist_ok=True)
        if not prepared.exists():
            prepared.symlink_to(tiny_model_dir)
        return settings

    return make


def workshop_of(settings: Settings, database: Database, tmp_path: Path) -> Workshop:
    script_path = tmp_path / "script.json"
    resources = Resources(
        settings=settings,
        database=database,
        storage=LocalStorage(settings.storage_dir),
        inference=InferenceServers(settings),
        doorbell=Doorbell(celery_application(settings)),
        trainer_command=(sys.executable, str(SCRIPTED_TRAINER), str(script_path)),
    )
    workshop = Workshop(resources, add_project(database), script_path)
    workshop.script()
    return workshop


@pytest.fixture
def workshop(worker_settings: Callable[..., Settings], sqlite_database: Database, tmp_path: Path) -> Workshop:
    """A worker on SQLite with a short lease."""
    return workshop_of(worker_settings(lease_seconds=10, heartbeat_seconds=0.5, poll_seconds=0.2), sqlite_database, tmp_path)
