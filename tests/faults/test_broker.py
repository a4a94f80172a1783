"""Faults of the broker, which only lowers latency: emptied, down, full, and flooded with nudges."""

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import redis
from sqlalchemy import select

from core.database import Database
from core.doorbell import celery_application, publish
from core.jobs.leases import Claim
from core.jobs.transitions import claim_for_training
from core.tables.jobs import TERMINAL_STATUSES, Job
from tests.faults.conftest import on_postgres, on_sqlite
from tests.faults.deployment import ROOT, Deployment, wait_for
from tests.rows import add_job, add_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DOWN_SECONDS = 8


def broker(deployment: Deployment) -> "redis.Redis[bytes]":
    return redis.Redis(unix_socket_path=str(deployment.stack.valkey_socket))


def test_9_jobs_whose_nudges_were_flushed_run_once_each(deployment: Deployment) -> None:
    deployment.signal("worker", 15)
    deployment.ended("worker")
    file_id = deployment.upload()
    job_ids = [deployment.create_job(file_id, seed=number, n_epochs=1) for number in range(100)]
    broker(deployment).flushall()
    script = deployment.settings.data_dir / "script.json"
    script.write_text(json.dumps({"steps": 3, "step_seconds": 0.01, "checkpoint_every": 100}))
    for name in ("worker2", "worker3"):  # the real workers, with a trainer that takes no time
        deployment.start(name, application="tests.fixtures.scripted_worker", TRAINER_SCRIPT=str(script), PYTHONPATH=str(ROOT))
    wait_for(lambda: all(deployment.job(job_id).status in TERMINAL_STATUSES for job_id in job_ids), 500)
    jobs = [deployment.job(job_id) for job_id in job_ids]
    assert Counter((job.status, job.attempt, job.lost_leases) for job in jobs) == {("succeeded", 1, 0): 100}


@on_sqlite
@pytest.mark.parametrize("trouble", ["down", "full"])
def test_10_without_the_broker_jobs_are_created_and_start_soon_after_it_is_back(deployment: Deployment, trouble: str) -> None:
    file_id = deployment.upload()
    if trouble == "down":
        deployment.kill("valkey")
    else:
        broker(deployment).config_set("maxmemory", 1)
    began = time.monotonic()
    job_id = deployment.create_job(file_id, n_epochs=2)
    assert time.monotonic() - began < 5
    ready = httpx2.get(f"{deployment.url}/readyz").json()
    assert ready["degraded"] == (["broker"] if trouble == "down" else []), ready
    time.sleep(DOWN_SECONDS)
    if trouble == "down":
        deployment.start("valkey")
    else:
        broker(deployment).config_set("maxmemory", 0)
    wait_for(lambda: deployment.job(job_id).started_at is not None, 5, lambda: deployment.story(job_id))
    deployment.wait_for_end(job_id)
    after = deployment.create_job(file_id, n_epochs=2)
    deployment.wait_for_end(after)


@on_sqlite
def test_10_a_broker_that_dies_leaves_the_running_task_alone_and_nudges_arrive_again(database_url: str, make_deployment: Callable[..., Deployment]) -> None:
    """The polls are off: what starts here was nudged, and runs as Celery's task."""
    deployment = make_deployment(database_url, SDFT_POLL_SECONDS="3600")
    deployment.start("valkey", "inference", "api", "worker")
    file_id = deployment.upload()
    job_id = deployment.create_job(file_id)
    deployment.wait_for_step(job_id, 5)
    deployment.kill("valkey")
    time.sleep(DOWN_SECONDS)
    deployment.start("valkey")
    job = deployment.wait_for_end(job_id)
    assert (job.attempt, job.lost_leases) == (1, 0)
    assert deployment.losses(job_id) == deployment.undisturbed_losses(file_id)
    after = deployment.create_job(file_id, n_epochs=2)
    assert deployment.wait_for_end(after).attempt == 1


@on_postgres
def test_10_a_broker_that_hangs_holds_up_no_request_and_no_job(deployment: Deployment) -> None:
    """It takes connections and what is sent, and never answers."""
    file_id = deployment.upload()
    deployment.signal("valkey", signal.SIGSTOP)
    client = deployment.client
    began = time.monotonic()
    job_ids = [deployment.create_job(file_id, seed=number, n_epochs=1) for number in range(20)]
    for job_id in job_ids[1:]:
        client.fine_tuning.jobs.pause(job_id)
        client.fine_tuning.jobs.cancel(job_id)
    assert time.monotonic() - began < 60, "58 requests, each of which would wait for most of a minute"
    assert httpx2.get(f"{deployment.url}/readyz").json()["degraded"] == ["broker"]
    wait_for(lambda: deployment.job(job_ids[0]).started_at is not None, 10, lambda: deployment.story(job_ids[0]))
    deployment.wait_for_end(job_ids[0])
    deployment.signal("valkey", signal.SIGCONT)
    after = deployment.create_job(file_id, n_epochs=2)
    deployment.wait_for_end(after)


@on_postgres
def test_11_the_same_nudge_fifty_times_is_one_claim(deployment: Deployment) -> None:
    job_id = deployment.create_job(n_epochs=2)
    application = celery_application(deployment.settings.model_copy(update={"redis_url": deployment.stack.broker_url}))
    with application:
        assert all(publish(application) for _ in range(50))
    assert deployment.wait_for_end(job_id).attempt == 1


def test_11_fifty_claimers_on_a_thousand_jobs_claim_each_once(database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of five processes with ten threads each, none of which is told that SQLite is busy."""
    monkeypatch.setattr("core.database.SQLITE_BUSY_SECONDS", 300)
    pools = [Database(database_url) for _ in range(5)]
    project_id = add_project(database)
    job_ids = [add_job(database, project_id, created_at=float(number)) for number in range(1000)]

    def claim_all(number: int) -> list[Claim]:
        claims = []
        while True:
            with pools[number % len(pools)].transaction() as session:
                claim = claim_for_training(session, 600)
            if claim is None:
                return claims
            claims.append(claim)

    with ThreadPoolExecutor(50) as threads:
        claims = [claim for found in threads.map(claim_all, range(50)) for claim in found]
    assert Counter(claim.job_id for claim in claims) == Counter(job_ids)
    assert len({claim.lease_token for claim in claims}) == 1000
    with database.reading() as session:
        assert set(session.scalars(select(Job.attempt))) == {1}
    for pool in pools:
        pool.close()
