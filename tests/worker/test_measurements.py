"""What a worker counts, and how Prometheus reads it."""

import threading
import urllib.request

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import update

from core.database import database_now
from core.jobs.transitions import claim_for_training, request_cancellation
from core.tables.jobs import Job
from local_stack.ports import free_local_port
from tests.worker.conftest import Workshop
from tests.worker.test_supervisor import wait_for_step
from worker.expired_leases import free_expired_leases
from worker.measurements import serve_measurements
from worker.tasks import seek_work


class Growth:
    """How much counters have grown since."""

    def __init__(self) -> None:
        self._before = self._read()

    def _read(self) -> dict[tuple[str, ...], float]:
        return {(sample.name, *sample.labels.values()): sample.value for family in REGISTRY.collect() for sample in family.samples}

    def of(self, *name: str) -> float:
        return self._read().get(name, 0) - self._before.get(name, 0)


def test_a_job_that_succeeds(workshop: Workshop) -> None:
    growth = Growth()
    workshop.add_job()
    seek_work(workshop.resources)
    assert growth.of("sdft_attempts_started_total") == growth.of("sdft_attempts_ended_total", "succeeded") == 1
    assert growth.of("sdft_checkpoints_stored_total") == 3
    assert growth.of("sdft_trainer_crashes_total") == growth.of("sdft_leases_lost_total") == 0


def test_crashes_until_it_fails(workshop: Workshop) -> None:
    growth = Growth()
    workshop.script(at={str(attempt): {"2": "crash"} for attempt in (1, 2, 3)})
    workshop.add_job()
    seek_work(workshop.resources)
    assert growth.of("sdft_trainer_crashes_total") == 3
    assert growth.of("sdft_attempts_ended_total", "requeued") == 2
    assert growth.of("sdft_attempts_ended_total", "failed") == 1


@pytest.mark.parametrize("what", ["cancelled", "lease_lost"])
def test_an_attempt_that_is_stopped(workshop: Workshop, what: str) -> None:
    growth = Growth()
    workshop.script(steps=500, step_seconds=0.05)
    job_id = workshop.add_job()
    thread = threading.Thread(target=seek_work, args=(workshop.resources,))
    thread.start()
    wait_for_step(workshop, job_id, 1)
    with workshop.database.transaction() as session:
        if what == "cancelled":
            request_cancellation(session, job_id)
        else:
            session.execute(update(Job).where(Job.id == job_id).values(lease_token="another's"))
    thread.join(60)
    assert growth.of("sdft_attempts_ended_total", what) == 1
    assert growth.of("sdft_leases_lost_total") == (what == "lease_lost")


def test_leases_of_lost_workers(workshop: Workshop) -> None:
    growth = Growth()
    job_id = workshop.add_job()
    with workshop.database.transaction() as session:
        assert claim_for_training(session, 60)
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=database_now() - 1))
    free_expired_leases(workshop.resources)
    free_expired_leases(workshop.resources)
    assert growth.of("sdft_expired_leases_released_total") == 1


def test_they_are_served_where_a_port_is_named(workshop: Workshop) -> None:
    serve_measurements(workshop.resources.settings)  # which name none: nothing listens
    port = free_local_port()
    serve_measurements(workshop.resources.settings.model_copy(update={"worker_metrics_port": port}))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    assert "sdft_attempts_started_total" in text
    assert "sdft_doorbell_failures_total" in text
    with pytest.raises(OSError, match="in use"):
        serve_measurements(workshop.resources.settings.model_copy(update={"worker_metrics_port": port}))
