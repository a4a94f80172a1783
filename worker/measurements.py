"""What a worker counts. Prometheus reads it on a port of the worker's own, where SDFT_WORKER_METRICS_PORT names one.

What rows can tell stands in the API's `/metrics` instead: these counters are of what no row remembers, and begin anew with each process.
"""

from prometheus_client import Counter, start_http_server
from sqlalchemy import select

from core.errors import ServiceError
from core.jobs.leases import Claim
from core.logging import get_logger
from core.settings import Settings
from core.tables.jobs import Job
from core.tracing import note_on_span
from worker.resources import Resources

log = get_logger(__name__)

attempts_started = Counter("sdft_attempts_started", "Attempts at training that this worker began.")
attempts_ended = Counter("sdft_attempts_ended", "Attempts that ended here, by what became of the job.", ["outcome"])
trainer_crashes = Counter("sdft_trainer_crashes", "Trainers that ended without a result and were not told to.")
leases_lost = Counter("sdft_leases_lost", "Leases that this worker held and lost.")
expired_leases_released = Counter("sdft_expired_leases_released", "Leases of workers that were lost, which this worker released.")
checkpoints_stored = Counter("sdft_checkpoints_stored", "Checkpoints that this worker put into storage.")

LEASE_LOST = "lease_lost"
"""The outcome of an attempt whose job is another's by now."""


def serve_measurements(settings: Settings) -> None:
    """Raises OSError where the port can't be had."""
    if settings.worker_metrics_port is not None:
        start_http_server(settings.worker_metrics_port, addr=settings.worker_metrics_host)
        log.info("measurements_served", host=settings.worker_metrics_host, port=settings.worker_metrics_port)


def count_end(resources: Resources, claim: Claim, *, settled: bool) -> None:
    """`settled`: the attempt ended under its lease, so that the job's row says how: succeeded, failed, cancelled or paused; requeued where
    it waits or trains again."""
    outcome = _outcome(resources, claim) if settled else LEASE_LOST
    attempts_ended.labels(outcome).inc()
    note_on_span(**{"sdft.outcome": outcome})


def _outcome(resources: Resources, claim: Claim) -> str:
    try:
        with resources.database.reading() as session:
            status = session.scalar(select(Job.status).where(Job.id == claim.job_id))
    except ServiceError:
        return "unknown"
    return "requeued" if status in ("queued", "running") else str(status)
