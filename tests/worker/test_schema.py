"""A worker and a database that was migrated for another version: it refuses to start, or claims nothing more and ends what it runs."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from core.database import Database
from core.schema_revision import HEAD
from core.settings import Settings
from core.workers import workers_that_are_there
from tests.rows import get_job
from tests.worker.conftest import Workshop, workshop_of
from tests.worker.test_supervisor import wait_for, wait_for_step
from worker import presence
from worker.polling import Poll
from worker.tasks import seek_work


@pytest.fixture
def workshop(worker_settings: Callable[..., Settings], database: Database, database_url: str, tmp_path: Path) -> Workshop:
    settings = worker_settings(database_url=database_url, lease_seconds=10, heartbeat_seconds=0.5, poll_seconds=0.1)
    settings.data_dir.mkdir(exist_ok=True)
    return workshop_of(settings, database, tmp_path)


@pytest.fixture(autouse=True)
def _tell_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "TELL_SECONDS", 0.1)


def set_revision(workshop: Workshop, revision: str) -> None:
    with workshop.database.transaction() as session:
        session.execute(text(f"update alembic_version set version_num = '{revision}'"))


def there(workshop: Workshop) -> int:
    with workshop.database.reading() as session:
        return len(workers_that_are_there(session))


def status_of(workshop: Workshop, job_id: str) -> str:
    return get_job(workshop.database, job_id).status


def test_after_a_migration_it_ends_what_it_runs_and_claims_nothing(workshop: Workshop) -> None:
    workshop.script(steps=40, step_seconds=0.05)
    running = workshop.add_job()
    thread = threading.Thread(target=Poll(workshop.resources).run)
    thread.start()
    try:
        wait_for_step(workshop, running, 2)
        assert there(workshop) == 1
        set_revision(workshop, "9999")
        wait_for(lambda: not workshop.resources.schema_fits)
        waiting = workshop.add_job()
        wait_for(lambda: status_of(workshop, running) == "succeeded", 60)
        seek_work(workshop.resources)  # a ring
        time.sleep(0.5)
        assert status_of(workshop, waiting) == "queued"
        assert there(workshop) == 0, "nobody counts on it"
        set_revision(workshop, HEAD)  # the new version was taken back
        wait_for(lambda: status_of(workshop, waiting) == "succeeded", 60)
        assert there(workshop) == 1
    finally:
        workshop.resources.stopping.set()
        thread.join(30)


@pytest.mark.parametrize("revision", ["0001", "9999"])
def test_it_does_not_start_on_another_schema(workshop: Workshop, revision: str) -> None:
    set_revision(workshop, revision)
    settings = workshop.resources.settings
    variables = {"SDFT_DATA_DIR": str(settings.data_dir), "SDFT_DATABASE_URL": settings.resolved_database_url, "SDFT_REDIS_URL": "redis://127.0.0.1:1/0"}
    command = [sys.executable, "-m", "celery", "--workdir", str(settings.data_dir), "-A", "worker.app", "worker", "--pool", "threads"]
    process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if "schema_does_not_fit" in line]
    assert revision in line
    assert "python -m migrations" in line
    assert there(workshop) == 0
