"""`/metrics` for Prometheus: this process's counters, and what the database's rows say about jobs and workers.

Every API process says the same about the rows: take the maximum over them, not the sum. No label holds an id.
"""

from collections.abc import Iterable, Iterator
from math import ceil

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from api.state import State
from core.database import Database, unix_now
from core.errors import Unavailable
from core.logging import get_logger
from core.tables.jobs import JOB_STATUSES, Job, JobMetrics
from core.tables.webhooks import WebhookDelivery
from core.workers import workers_that_are_there

RECENT_SECONDS = 3600
QUANTILES = (0.5, 0.9, 1.0)
WAITING_STATUSES = ("validating_files", "queued")

router = APIRouter(tags=["operation"])
log = get_logger(__name__)


@router.get("/metrics")
async def metrics(state: State) -> Response:
    return Response(await state.measurements.get(lambda: _measured_now(state.database)), media_type=CONTENT_TYPE_LATEST)


def _measured_now(database: Database) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    try:
        with database.reading() as session:
            registry.register(_Measured(measure_rows(session)))
    except Unavailable as error:  # the other measurements are wanted most while the database is down
        log.warning("rows_not_measured", error=error.message)
    return generate_latest() + generate_latest(registry)


def measure_rows(session: Session) -> list[Metric]:
    return [*_jobs(session), *_workers(session), *_running_steps(session), _deliveries(session)]


class _Measured(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _jobs(session: Session) -> Iterator[Metric]:
    """How many there are, how long the oldest waits, and how long those waited that began lately."""
    grouped = select(Job.status, func.count().label("number"), func.min(Job.created_at).filter(Job.attempt == 0).label("oldest")).group_by(Job.status)
    rows = {row.status: row for row in session.execute(grouped)}
    by_status = GaugeMetricFamily("sdft_jobs", "Fine-tuning jobs by status.", labels=["status"])
    for status in JOB_STATUSES:
        by_status.add_metric([status], rows[status].number if status in rows else 0)
    yield by_status

    oldest = GaugeMetricFamily("sdft_oldest_job_wait_seconds", "Since the oldest job of this status was created that never ran; 0: none.", labels=["status"])
    for status in WAITING_STATUSES:
        created_at = rows[status].oldest if status in rows else None
        oldest.add_metric([status], 0 if created_at is None else max(0.0, unix_now() - created_at))
    yield oldest

    waited = select(Job.started_at - Job.created_at).where(Job.started_at > unix_now() - RECENT_SECONDS)
    recent = GaugeMetricFamily("sdft_recent_job_wait_seconds", "From creation to first start, of jobs that started within the hour.", labels=["quantile"])
    for quantile, seconds in _quantiles(session.scalars(waited)):
        recent.add_metric([quantile], seconds)
    yield recent


def _workers(session: Session) -> Iterator[Metric]:
    there = workers_that_are_there(session)
    yield GaugeMetricFamily("sdft_workers", "Worker processes that are there.", value=len(there))
    yield GaugeMetricFamily("sdft_worker_slots", "Jobs that they train at a time, all together.", value=sum(worker.slots for worker in there))


def _running_steps(session: Session) -> Iterator[Metric]:
    """The newest step of each running job."""
    newest = select(Job.base_model, JobMetrics.metrics).join(JobMetrics, and_(JobMetrics.job_id == Job.id, JobMetrics.step == Job.step))
    by_model: dict[str, list[dict[str, float]]] = {}
    for row in session.execute(newest.where(Job.status == "running")):
        by_model.setdefault(row.base_model, []).append(row.metrics)
    seconds = GaugeMetricFamily("sdft_step_seconds", "Of the newest step of each running job.", labels=["base_model", "quantile"])
    memory = GaugeMetricFamily("sdft_trainer_peak_memory_bytes", "The most that a running trainer has held: its device's memory.", labels=["base_model"])
    for base_model, steps in sorted(by_model.items()):
        for quantile, value in _quantiles(step["step_seconds"] for step in steps):
            seconds.add_metric([base_model, quantile], value)
        memory.add_metric([base_model], max(step["peak_memory_bytes"] for step in steps))
    yield seconds
    yield memory


def _deliveries(session: Session) -> Metric:
    """Of webhooks, counted in indexes: the rows hold a month's bodies."""
    number = select(func.count()).select_from(WebhookDelivery)
    pending = session.scalar(number.where(WebhookDelivery.next_attempt_at.is_not(None))) or 0
    failed = session.scalar(number.where(WebhookDelivery.failed_at.is_not(None))) or 0
    every = session.scalar(number) or 0
    family = GaugeMetricFamily("sdft_webhook_deliveries", "Webhook deliveries of the last 30 days: pending, delivered or failed.", labels=["status"])
    for status, value in (("pending", pending), ("delivered", max(0, every - pending - failed)), ("failed", failed)):
        family.add_metric([status], value)
    return family


def _quantiles(values: Iterable[float | None]) -> list[tuple[str, float]]:
    """The nearest values that were measured; nothing where none was."""
    ordered = sorted(value for value in values if value is not None)
    return [(f"{quantile:g}", ordered[ceil(quantile * len(ordered)) - 1]) for quantile in QUANTILES] if ordered else []
