"""Real Celery workers over a real Valkey, and what becomes of their jobs when processes are stopped, killed or cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from openai import OpenAI
from sqlalchemy import select

from core.database import Database
from core.doorbell import celery_application, publish
from core.jobs.transitions import request_cancellation
from core.settings import Settings
from core.tables.jobs import Checkpoint, Job, JobMetrics
from tests.fixtures.scripted_inference import ScriptedInference
from tests.fixtures.scripted_model import state_after
from tests.fixtures.webhook_receiver import Receiver, receiving
from tests.rows import add_endpoint, assert_sound, deliveries_of, get_endpoint, get_job, messages_of
from tests.worker.conftest import ROWS, Workshop, workshop_of
from tests.worker.test_supervisor import final_state, wait_for, wait_for_step

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LEASE_SECONDS = 5.0
NO_BROKER = "redis+socket:///nowhere/valkey.sock"


class Workers:
    """Starts workers as an operator would, on one data directory."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, **overrides: str) -> subprocess.Popen[bytes]:
        settings = self.workshop.resources.settings
        environment = {
            **os.environ,
            "SDFT_DATA_DIR": str(settings.data_dir),
            "SDFT_CACHE_DIR": str(settings.cache_dir),
            "SDFT_BASE_MODELS": json.dumps([entry.model_dump() for entry in settings.base_models]),
            "SDFT_DATABASE_URL": settings.resolved_database_url,
            "SDFT_REDIS_URL": settings.resolved_redis_url,
            "SDFT_INFERENCE_URLS": settings.inference_urls[0],
            "SDFT_LEASE_SECONDS": str(settings.lease_seconds),
            "SDFT_HEARTBEAT_SECONDS": str(settings.heartbeat_seconds),
            "SDFT_POLL_SECONDS": str(settings.poll_seconds),
            "TRAINER_SCRIPT": str(self.workshop.script_path),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "celery", "--workdir", str(settings.data_dir), "-A", "tests.fixtures.scripted_worker", "worker"]
        number = len(self.started)
        options = ["--pool", "threads", "--without-gossip", "--without-mingle", "--hostname", f"worker{number}@%h"]
        with (settings.data_dir / f"worker-{number}.log").open("wb") as log:
            process = subprocess.Popen(command + options, env=environment | overrides, stdout=log, stderr=log, start_new_session=True)
        self.started.append(process)
        return process

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.workshop.resources.settings.data_dir.glob("worker-*.log")))

    def stop_all(self) -> None:
        for process in self.started:
            for child in children_of(process):
                child.kill()
            process.kill()
            process.wait()


def children_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


def trainer_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    wait_for(lambda: bool(children_of(process)))
    return children_of(process)[0]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def workshop(worker_settings: Callable[..., Settings], sqlite_database: Database, tmp_path: Path, valkey: str) -> Workshop:
    redis.Redis(unix_socket_path=valkey.removeprefix("redis+socket://")).flushall()
    settings = worker_settings(lease_seconds=LEASE_SECONDS, heartbeat_seconds=0.5, poll_seconds=0.3, redis_url=valkey)
    return workshop_of(settings, sqlite_database, tmp_path)


@pytest.fixture
def workers(workshop: Workshop) -> Iterator[Workers]:
    yield from started_workers(workshop)


def started_workers(workshop: Workshop) -> Iterator[Workers]:
    started = Workers(workshop)
    yield started
    started.stop_all()
    sys.stdout.write(started.logs())


@pytest.fixture
def postgres_workers(worker_settings: Callable[..., Settings], postgres_url: str, tmp_path: Path, valkey: str) -> Iterator[Workers]:
    settings = worker_settings(lease_seconds=LEASE_SECONDS, heartbeat_seconds=0.5, poll_seconds=0.3, redis_url=valkey, database_url=postgres_url)
    settings.data_dir.mkdir()
    database = Database(postgres_url)
    yield from started_workers(workshop_of(settings, database, tmp_path))
    database.close()


def status_of(workshop: Workshop, job_id: str) -> str:
    return get_job(workshop.database, job_id).status


def wait_for_success(workshop: Workshop, job_id: str, seconds: float = 90) -> Job:
    wait_for(lambda: status_of(workshop, job_id) in ("succeeded", "failed"), seconds)
    job = get_job(workshop.database, job_id)
    assert job.status == "succeeded", job.error
    assert_sound(workshop.database, job_id)
    return job


def test_a_ring_starts_a_job_at_once_and_it_runs_to_its_end(workshop: Workshop, workers: Workers, inference: ScriptedInference) -> None:
    """The poll is slow here: only the doorbell can be what starts it."""
    worker = workers.start(SDFT_POLL_SECONDS="3600")
    wait_for(lambda: "ready." in workers.logs())
    workshop.script(steps=60)  # as many as the worker's own validation finds
    job_id = workshop.add_job("validating_files", method={"type": "sdft", "sdft": {"hyperparameters": {"n_epochs": 20, "batch_size": 4}}})
    assert publish(celery_application(workshop.resources.settings))
    wait_for(lambda: status_of(workshop, job_id) in ("running", "succeeded"), 60)
    assert wait_for_success(workshop, job_id).attempt == 1
    assert final_state(workshop, job_id, inference) == state_after(60, ROWS)
    worker.terminate()
    assert worker.wait(60) == 0
    lines = [json.loads(line) for line in workers.logs().splitlines() if '"event": "trainer_started"' in line]
    assert [line["job_id"] for line in lines] == [job_id]


def test_the_worker_takes_its_threads_from_the_settings(workshop: Workshop, workers: Workers) -> None:
    """No option of its command line says how many."""
    workers.start(SDFT_TRAINING_SLOTS="3")
    wait_for(lambda: "ready." in workers.logs())
    (stats,) = celery_application(workshop.resources.settings).control.inspect(timeout=5, limit=1).stats().values()
    assert stats["pool"]["max-concurrency"] == 5


def test_with_the_broker_down_jobs_start_within_five_seconds_and_the_worker_still_stops(workshop: Workshop, workers: Workers) -> None:
    worker = workers.start(SDFT_REDIS_URL=NO_BROKER)
    wait_for(lambda: "Cannot connect" in workers.logs())
    job_id = workshop.add_job("validating_files")
    wait_for(lambda: status_of(workshop, job_id) in ("running", "succeeded"), 60)
    wait_for_success(workshop, job_id)
    worker.terminate()
    worker.wait(60)


def test_sigterm_hands_the_job_back_uncharged_and_another_worker_finishes_it(workshop: Workshop, workers: Workers, inference: ScriptedInference) -> None:
    workshop.script(steps=100, step_seconds=0.1, checkpoint_every=40)
    job_id = workshop.add_job()
    worker = workers.start()
    wait_for_step(workshop, job_id, 5)
    trainer = trainer_of(worker)
    asked_at = time.monotonic()
    worker.terminate()
    assert worker.wait(60) == 0
    assert time.monotonic() - asked_at < 30
    assert is_gone(trainer)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.lease_token, job.lost_leases) == ("queued", None, 0)
    with workshop.database.reading() as session:
        assert session.scalars(select(Checkpoint.step).where(Checkpoint.job_id == job_id)).all() == [job.step]
    workshop.script(steps=100, step_seconds=0.01, checkpoint_every=40)
    workers.start()
    assert wait_for_success(workshop, job_id).attempt == 2
    assert f"resumed at step {job.step}" in messages_of(workshop.database, job_id)
    assert final_state(workshop, job_id, inference) == state_after(100, ROWS)


@pytest.mark.parametrize("with_trainer", [False, True], ids=["main_process_alone", "everything"])
def test_after_a_kill_of_the_worker_another_finishes_the_job(workshop: Workshop, workers: Workers, inference: ScriptedInference, with_trainer: bool) -> None:
    workshop.script(steps=60, step_seconds=0.1)
    job_id = workshop.add_job()
    worker = workers.start()
    wait_for_step(workshop, job_id, 6)
    trainer = trainer_of(worker)
    if with_trainer:
        os.killpg(trainer.pid, signal.SIGKILL)
    worker.kill()
    worker.wait()
    wait_for(lambda: is_gone(trainer), 10)
    assert status_of(workshop, job_id) == "running", "nobody has noticed yet"
    workers.start()
    job = wait_for_success(workshop, job_id)
    assert (job.attempt, job.lost_leases) == (2, 0), "the loss is forgiven once a new checkpoint is stored"
    assert final_state(workshop, job_id, inference) == state_after(60, ROWS)
    with workshop.database.reading() as session:
        steps = session.scalars(select(JobMetrics.step).where(JobMetrics.job_id == job_id).order_by(JobMetrics.step)).all()
    assert steps == list(range(1, 61))


def test_a_worker_that_freezes_past_its_lease_writes_nothing_when_it_wakes(postgres_workers: Workers, inference: ScriptedInference) -> None:
    """On Postgres: a process that freezes may hold SQLite's one write lock, and then nobody can write."""
    workers, workshop = postgres_workers, postgres_workers.workshop
    workshop.script(steps=80, step_seconds=0.1)
    job_id = workshop.add_job()
    frozen = workers.start()
    wait_for_step(workshop, job_id, 6)
    trainer = trainer_of(frozen)
    frozen.send_signal(signal.SIGSTOP)
    wait_for(lambda: is_gone(trainer), LEASE_SECONDS + 10)
    workers.start()
    wait_for(lambda: get_job(workshop.database, job_id).attempt == 2)
    frozen.send_signal(signal.SIGCONT)
    job = wait_for_success(workshop, job_id)
    assert (job.attempt, job.lost_leases) == (2, 0), "the loss is forgiven once a new checkpoint is stored"
    assert final_state(workshop, job_id, inference) == state_after(80, ROWS)
    assert "attempt_abandoned" in workers.logs()
    with workshop.database.reading() as session:
        attempts = session.execute(select(JobMetrics.step, JobMetrics.attempt).where(JobMetrics.job_id == job_id).order_by(JobMetrics.step)).all()
    assert [attempt for _, attempt in attempts] == sorted(attempt for _, attempt in attempts), "no step of the stale attempt after the second began"


def test_a_killed_trainer_is_started_again_by_the_same_worker(workshop: Workshop, workers: Workers, inference: ScriptedInference) -> None:
    workshop.script(steps=40, step_seconds=0.1)
    job_id = workshop.add_job()
    worker = workers.start()
    wait_for_step(workshop, job_id, 6)
    trainer_of(worker).kill()
    job = wait_for_success(workshop, job_id)
    assert (job.attempt, job.lost_leases) == (2, 0), "the loss is forgiven once a new checkpoint is stored"
    assert any(message.startswith("resumed at step") for message in messages_of(workshop.database, job_id))
    assert final_state(workshop, job_id, inference) == state_after(40, ROWS)


def test_cancelling_stops_the_trainer_and_the_worker_goes_on(workshop: Workshop, workers: Workers) -> None:
    workshop.script(steps=1000, step_seconds=0.1)
    job_id = workshop.add_job()
    worker = workers.start()
    wait_for_step(workshop, job_id, 2)
    trainer = trainer_of(worker)
    with workshop.database.transaction() as session:
        request_cancellation(session, job_id)
    wait_for(lambda: status_of(workshop, job_id) == "cancelled")
    assert is_gone(trainer)
    assert_sound(workshop.database, job_id)
    workshop.script()
    wait_for_success(workshop, workshop.add_job())
    assert worker.poll() is None


def test_ends_of_jobs_are_told_to_webhooks(workers: Workers) -> None:
    workshop = workers.workshop
    with receiving(Receiver([503, 200])) as receiver:
        endpoint_id = add_endpoint(workshop.database, workshop.project_id, receiver.url)
        job_id, cancelled = workshop.add_job(), workshop.add_job()
        with workshop.database.transaction() as session:
            request_cancellation(session, cancelled)
        process = workers.start(SDFT_WEBHOOK_ALLOW_INSECURE="true")
        wait_for(
            lambda: all(delivery.delivered_at for delivery in deliveries_of(workshop.database, endpoint_id)) and status_of(workshop, job_id) == "succeeded", 60
        )
        process.terminate()
        assert process.wait(30) == 0
    secret = get_endpoint(workshop.database, endpoint_id).secret
    client = OpenAI(api_key="unused", base_url="http://127.0.0.1:1")
    events = [client.webhooks.unwrap(request.body, request.headers, secret=secret) for request in receiver.received]
    assert sorted((event.type, event.data.id) for event in events) == sorted(  # type: ignore[union-attr]
        [("fine_tuning.job.succeeded", job_id), *[("fine_tuning.job.cancelled", cancelled)] * 2]
    )
    assert_sound(workshop.database, job_id)
    assert '"event": "webhook_delivered"' in workers.logs()
    assert secret not in workers.logs()
