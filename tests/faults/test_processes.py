"""Faults 1 to 5 of the processes that run a job: trainer and worker are killed, frozen and deployed over."""

import os
import signal
import time
from collections.abc import Callable

import pytest
from sqlalchemy import select

from core.tables.jobs import Checkpoint
from tests.faults.conftest import LEASE_SECONDS, on_postgres, on_sqlite
from tests.faults.deployment import Deployment, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@on_sqlite
def test_1_a_killed_trainer_resumes_and_the_loss_goes_on_exactly(deployment: Deployment) -> None:
    file_id = deployment.upload()
    disturbed = deployment.create_job(file_id)
    deployment.wait_for_step(disturbed, 30)
    for trainer in deployment.trainers(disturbed):
        trainer.kill()
    job = deployment.wait_for_end(disturbed)
    assert (job.attempt, job.lost_leases) == (2, 0), "the loss is forgiven once a new checkpoint is stored"
    assert any("resumed at step" in message for message in deployment.messages(disturbed))
    assert deployment.losses(disturbed) == deployment.undisturbed_losses(file_id)


@pytest.mark.parametrize("whole_group", [False, True], ids=["2_main_process", "3_main_process_and_trainer"])
def test_a_killed_worker_s_job_goes_on_elsewhere(database_url: str, make_deployment: Callable[..., Deployment], whole_group: bool) -> None:
    """The lease is longer than the trainer may live on: that it ends at its deadline is another test's matter."""
    deployment = make_deployment(database_url, SDFT_LEASE_SECONDS=str(3 * LEASE_SECONDS))
    deployment.start("valkey", "inference", "api", "worker")
    job_id = deployment.create_job()
    deployment.wait_for_checkpoint(job_id)
    trainers = deployment.trainers(job_id)
    assert len(trainers) == 1
    if whole_group:
        os.killpg(trainers[0].pid, signal.SIGKILL)
    deployment.kill("worker")
    wait_for(lambda: deployment.trainers(job_id) == [], 5)
    assert deployment.job(job_id).status == "running", "nobody has noticed yet"
    deployment.start("worker2")
    job = deployment.wait_for_end(job_id)
    assert (job.attempt, job.lost_leases) == (2, 0), "the loss is forgiven once a new checkpoint is stored"
    assert any("resumed at step" in message for message in deployment.messages(job_id))


def test_4_a_frozen_worker_s_trainer_stops_itself_and_the_stale_attempt_writes_nothing(postgres_url: str, make_deployment: Callable[..., Deployment]) -> None:
    """On Postgres: a process that freezes may hold SQLite's one write lock, and then nobody can write."""
    lease_seconds = 2 * LEASE_SECONDS
    deployment = make_deployment(postgres_url, SDFT_LEASE_SECONDS=str(lease_seconds))
    deployment.start("valkey", "inference", "api", "worker")
    job_id = deployment.create_job(batch_size=1)
    deployment.wait_for_step(job_id, 30)
    deployment.signal("worker", signal.SIGSTOP)
    frozen_at = time.monotonic()
    wait_for(lambda: deployment.trainers(job_id) == [], lease_seconds)
    assert time.monotonic() - frozen_at < lease_seconds, "before anybody else may claim it"
    assert not (deployment.settings.runs_dir / job_id / "attempt-1" / "result.json").exists(), "it trained to its end instead"
    deployment.start("worker2")
    wait_for(lambda: deployment.job(job_id).attempt == 2, 60)
    deployment.signal("worker", signal.SIGCONT)
    job = deployment.wait_for_end(job_id)
    assert (job.attempt, job.lost_leases) == (2, 0), "the loss is forgiven once a new checkpoint is stored"
    wait_for(lambda: "attempt_abandoned" in deployment.log_of("worker"), 20)


@on_postgres
def test_5_a_deploy_saves_a_checkpoint_and_charges_nothing(deployment: Deployment) -> None:
    job_id = deployment.create_job(checkpoint_every_steps=1000)
    deployment.wait_for_step(job_id, 30)
    asked_at = time.monotonic()
    deployment.signal("worker", signal.SIGTERM)
    assert deployment.ended("worker") == 0
    assert time.monotonic() - asked_at < 30
    job = deployment.job(job_id)
    assert (job.status, job.lost_leases, job.lease_token) == ("queued", 0, None)
    with deployment.database.reading() as session:
        assert session.scalars(select(Checkpoint.step).where(Checkpoint.job_id == job_id)).all() == [job.step]
    deployment.start("worker2")
    assert deployment.wait_for_end(job_id).lost_leases == 0
    assert f"resumed at step {job.step}" in " ".join(deployment.messages(job_id))
