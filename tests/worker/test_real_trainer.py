"""Validation, the real trainer on a tiny model, and publication: both sides of the run directory together."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from core.database import Database
from core.jobs.transitions import claim_for_training, claim_for_validation
from core.settings import Settings
from core.tables.jobs import Checkpoint, JobMetrics
from core.tables.models import Model
from sdft_engine.contract.machine_clock import machine_seconds
from sdft_engine.contract.run_directory import Attestation
from tests.rows import assert_sound, get_job, messages_of
from tests.worker.conftest import Workshop, demonstration_file, workshop_of
from worker.devices import DeviceGroup
from worker.resources import TRAINER_COMMAND
from worker.supervisor import train
from worker.validation import validate

pytestmark = pytest.mark.slow


@pytest.fixture
def real_workshop(worker_settings: Callable[..., Settings], sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """No inference server: what is under test ends with the adapter in storage."""
    monkeypatch.setattr("worker.publisher.VERIFICATION_ATTEMPTS", 1)
    settings = worker_settings(lease_seconds=60, heartbeat_seconds=1, inference_urls=["http://127.0.0.1:9"], device="cpu", dtype="float32", trainer_threads=1)
    workshop = workshop_of(settings, sqlite_database, tmp_path)
    workshop.resources.trainer_command = TRAINER_COMMAND
    return workshop


def run_job(workshop: Workshop, group: DeviceGroup = DeviceGroup(), **job: object) -> str:  # noqa: B008 (frozen)
    job_id = workshop.add_job("validating_files", **job)  # type: ignore[arg-type]
    claimed_at = machine_seconds()
    with workshop.database.transaction() as session:
        claim = claim_for_validation(session, 60)
    assert claim is not None
    validate(workshop.resources, claim, claimed_at)
    claimed_at = machine_seconds()
    with workshop.database.transaction() as session:
        claim = claim_for_training(session, 60)
    assert claim is not None, get_job(workshop.database, job_id).error
    train(workshop.resources, claim, claimed_at, group)
    return job_id


def test_an_sdft_job_and_one_that_continues_from_it(real_workshop: Workshop, tmp_path: Path) -> None:
    hyperparameters = {"n_epochs": 1, "batch_size": 4, "lora_rank": 4, "checkpoint_every_steps": 2, "mask_clipped_completions": False}
    method = {"type": "sdft", "sdft": {"hyperparameters": hyperparameters, "teacher_template": "history"}}
    job_id = run_job(real_workshop, method=method, validation_file_id=real_workshop.add_file(demonstration_file(3)))
    job = get_job(real_workshop.database, job_id)
    assert (job.status, job.error) == ("succeeded", None), messages_of(real_workshop.database, job_id)
    assert_sound(real_workshop.database, job_id)
    assert job.resolved_hyperparameters is not None
    assert isinstance(job.resolved_hyperparameters["temperature"], float)
    with real_workshop.database.reading() as session:
        metrics = session.scalars(select(JobMetrics).where(JobMetrics.job_id == job_id).order_by(JobMetrics.step)).all()
        checkpoints = session.scalars(select(Checkpoint.step).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)).all()
        model = session.scalars(select(Model).where(Model.job_id == job_id, Model.step.is_(None))).one()
    assert [row.step for row in metrics] == [1, 2, 3]
    assert metrics[-1].metrics["valid_loss"] > 0
    assert job.trained_tokens == sum(row.metrics["trained_tokens"] for row in metrics)
    assert checkpoints == [2]
    unpacked = tmp_path / "unpacked"
    with tarfile.open(real_workshop.resources.storage.path_of(model.storage_key)) as archive:  # type: ignore[attr-defined]
        archive.extractall(unpacked, filter="data")
    attestation = Attestation.model_validate_json((unpacked / "attestation.json").read_bytes())
    assert all(len(probe.adapter_logps) == len(probe.token_ids) - 1 for probe in attestation.probes)

    supervised = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 12, "lora_rank": 4}}}
    next_id = run_job(real_workshop, method=supervised, parent_model=model.id)
    assert get_job(real_workshop.database, next_id).status == "succeeded", messages_of(real_workshop.database, next_id)


def test_a_job_with_two_devices_trains_in_two_processes(real_workshop: Workshop) -> None:
    hyperparameters = {"n_epochs": 1, "batch_size": 4, "lora_rank": 4, "checkpoint_every_steps": 2, "mask_clipped_completions": False}
    job_id = run_job(real_workshop, DeviceGroup(("cpu", "cpu")), method={"type": "sdft", "sdft": {"hyperparameters": hyperparameters}})
    job = get_job(real_workshop.database, job_id)
    assert (job.status, job.error) == ("succeeded", None), messages_of(real_workshop.database, job_id)
    assert any("by 2 processes" in message for message in messages_of(real_workshop.database, job_id))
    assert_sound(real_workshop.database, job_id)
