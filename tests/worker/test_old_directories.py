"""Directories of the machine that go, and those that stay."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.database import Database, unix_now
from core.settings import Settings
from core.tables.jobs import JOB_STATUSES, TERMINAL_STATUSES
from tests.fixtures.scripted_inference import ScriptedInference
from tests.rows import add_job
from tests.worker.conftest import Workshop, workshop_of
from tests.worker.test_garbage_collection import LONG_AGO, add_export, add_model
from worker.old_directories import remove_export_directories, remove_idle_rollout_adapters, remove_old_runs, remove_unserved_adapters


@pytest.fixture
def workshop(worker_settings: Callable[..., Settings], database: Database, database_url: str, tmp_path: Path) -> Workshop:
    """A worker on SQLite and on Postgres."""
    return workshop_of(worker_settings(database_url=database_url), database, tmp_path)


def make(path: Path, age_seconds: float = 0) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text("content")
    os.utime(path, (time.time() - age_seconds, time.time() - age_seconds))
    return path


def names_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_nothing_is_there_to_be_removed(workshop: Workshop) -> None:
    for rule in (remove_old_runs, remove_export_directories, remove_unserved_adapters, remove_idle_rollout_adapters):
        assert rule(workshop.resources) == 0


@pytest.mark.parametrize("status", JOB_STATUSES)
def test_runs_go_some_time_after_their_jobs_ended(workshop: Workshop, status: str) -> None:
    keep, root = workshop.resources.settings.keep_runs_seconds, workshop.resources.settings.runs_dir
    ended = status in TERMINAL_STATUSES
    old = add_job(workshop.database, workshop.project_id, status, finished_at=unix_now() - keep - 60 if ended else None)
    new = add_job(workshop.database, workshop.project_id, status, finished_at=unix_now() - keep + 60 if ended else None)
    for job_id in (old, new):
        make(root / job_id / "attempt-1", LONG_AGO)
        os.utime(root / job_id, (0, 0))
    assert remove_old_runs(workshop.resources) == ended
    assert names_in(root) == ([new] if ended else sorted([old, new]))


def test_runs_without_a_job_go_when_they_are_old(workshop: Workshop) -> None:
    root = workshop.resources.settings.runs_dir
    make(root / "ftjob-unknown", LONG_AGO)
    make(root / "ftjob-young")
    assert remove_old_runs(workshop.resources) == 1
    assert names_in(root) == ["ftjob-young"]


def test_directories_of_exports_that_nobody_makes_go(workshop: Workshop) -> None:
    root = workshop.resources.settings.exports_dir
    add_export(workshop, add_model(workshop, "models/a.tar.gz"), "gguf", status="running", lease_token="held", lease_until=unix_now() + 60)
    for name in ("held", "left"):
        make(root / name)
    assert remove_export_directories(workshop.resources) == 1
    assert names_in(root) == ["held"]


def test_adapters_of_models_that_can_not_be_served_go(workshop: Workshop, inference: ScriptedInference) -> None:
    root = workshop.resources.settings.served_adapters_dir
    live, unverified = add_model(workshop, "models/live.tar.gz"), add_model(workshop, "models/new.tar.gz", "unverified")
    deleted = add_model(workshop, "models/deleted.tar.gz", "deleted")
    make(root / live.serving_name, LONG_AGO)
    make(root / unverified.serving_name, LONG_AGO)
    make(root / deleted.serving_name)
    make(root / "never-registered", LONG_AGO)
    make(root / "about-to-be-registered")
    make(root / ".half-unpacked.token", LONG_AGO)
    make(root / ".being-unpacked.token")
    (root / ".half-unpacked.token.tar").write_bytes(b"half")
    os.utime(root / ".half-unpacked.token.tar", (0, 0))
    inference.adapters |= {deleted.serving_name: 1, live.serving_name: 2, "never-registered": 3}
    assert remove_unserved_adapters(workshop.resources) == 4
    assert names_in(root) == sorted([live.serving_name, unverified.serving_name, "about-to-be-registered", ".being-unpacked.token"])
    assert inference.adapters == {live.serving_name: 2}


def test_rollout_adapters_go_unless_their_job_runs(workshop: Workshop, inference: ScriptedInference) -> None:
    root = workshop.resources.settings.served_adapters_dir
    running = add_job(workshop.database, workshop.project_id, "running", attempt=2, lease_token="t", lease_until=1e12)
    queued = add_job(workshop.database, workshop.project_id, "queued", attempt=1)
    ended = add_job(workshop.database, workshop.project_id, "failed", attempt=3, finished_at=unix_now())
    kept = [make(root / f"rollout-{running}-2-7", LONG_AGO), make(root / "rollout-ftjob-0123456789abcdef-1-1")]
    gone = [make(root / name) for name in (f"rollout-{queued}-1-4", f"rollout-{ended}-3-9", f"rollout-{ended}-1-2")]
    gone.append(make(root / "rollout-ftjob-fedcba9876543210-1-1", LONG_AGO))
    inference.adapters |= dict.fromkeys((path.name for path in (*kept, *gone)), 1)
    assert remove_idle_rollout_adapters(workshop.resources) == 4
    assert remove_unserved_adapters(workshop.resources) == 0
    assert names_in(root) == sorted(path.name for path in kept)
    assert set(inference.adapters) == {path.name for path in kept}


def test_a_later_attempt_s_rollout_adapters_stay(workshop: Workshop) -> None:
    """It began after the job was looked at."""
    root = workshop.resources.settings.served_adapters_dir
    job_id = add_job(workshop.database, workshop.project_id, "queued", attempt=1)
    make(root / f"rollout-{job_id}-1-4")
    make(root / f"rollout-{job_id}-2-1")
    assert remove_idle_rollout_adapters(workshop.resources) == 1
    assert names_in(root) == [f"rollout-{job_id}-2-1"]


def test_adapters_that_were_sent_go_from_the_server_that_has_them(workshop: Workshop, inference: ScriptedInference) -> None:
    """By rows alone: of what is in no row here, another service may have need."""
    inference.sent.taken = True
    for client in workshop.resources.inference.clients:
        client.sends_files = True
    live, deleted = add_model(workshop, "models/live.tar.gz"), add_model(workshop, "models/deleted.tar.gz", "deleted")
    running = add_job(workshop.database, workshop.project_id, "running", attempt=2, lease_token="t", lease_until=1e12)
    ended = add_job(workshop.database, workshop.project_id, "failed", attempt=3, finished_at=unix_now())
    kept = [live.serving_name, f"rollout-{running}-2-7", "of-another-service", "rollout-ftjob-0123456789abcdef-1-1"]
    gone = [deleted.serving_name, f"rollout-{ended}-3-9"]
    for name in (*kept, *gone):
        (inference.sent.directory / name).mkdir()
    inference.adapters |= dict.fromkeys((*kept, *gone), 1)
    assert (remove_unserved_adapters(workshop.resources), remove_idle_rollout_adapters(workshop.resources)) == (1, 1)
    assert inference.sent.names() == sorted(kept)
    assert set(inference.adapters) == set(kept)


def test_a_server_that_does_not_say_what_it_was_sent_keeps_nothing_here(workshop: Workshop, inference: ScriptedInference) -> None:
    for client in workshop.resources.inference.clients:
        client.sends_files = True
    inference.sent.taken = False
    deleted = add_model(workshop, "models/deleted.tar.gz", "deleted")
    make(workshop.resources.settings.served_adapters_dir / deleted.serving_name)
    assert remove_unserved_adapters(workshop.resources) == 1
