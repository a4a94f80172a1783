"""Whether this server lives and can work, and its measurements: the only routes that need no key."""

import asyncio
from collections.abc import Callable
from typing import Literal

import anyio.to_thread
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest
from pydantic import BaseModel
from sqlalchemy import case, func, select

from api.state import ApiState, State
from core.doorbell import broker_answers
from core.errors import Unavailable
from core.logging import get_logger
from core.tables.jobs import JOB_STATUSES, Job
from core.tables.webhooks import WebhookDelivery

router = APIRouter(tags=["operation"])
log = get_logger(__name__)
jobs_by_status = Gauge("sdft_jobs", "Fine-tuning jobs by status.", ["status"])
deliveries_by_status = Gauge("sdft_webhook_deliveries", "Webhook deliveries: pending, delivered or failed.", ["status"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """`degraded` names what does not answer. Without broker or inference server files and jobs are still accepted."""

    status: Literal["ok", "degraded", "unavailable"]
    degraded: list[str]
    checks: dict[str, Literal["ok", "unreachable"]]


@router.get("/healthz")
async def healthz() -> Health:
    return Health()


@router.get("/readyz")
async def readyz(state: State, response: Response) -> Readiness:
    """503 only where the database is down."""
    probes: dict[str, Callable[[], bool]] = {
        "database": lambda: _database_answers(state),
        "broker": lambda: broker_answers(state.settings.resolved_redis_url),
        "inference": state.inference.healthy,
    }
    answers = await asyncio.gather(*(anyio.to_thread.run_sync(probe) for probe in probes.values()))
    degraded = [name for name, reached in zip(probes, answers, strict=True) if not reached]
    if "database" in degraded:
        response.status_code = 503
        response.headers["retry-after"] = "2"
    return Readiness(
        status="unavailable" if "database" in degraded else "degraded" if degraded else "ok",
        degraded=degraded,
        checks={name: "unreachable" if name in degraded else "ok" for name in probes},
    )


@router.get("/metrics")
def metrics(state: State) -> Response:
    try:
        _count_jobs(state)
        _count_deliveries(state)
    except Unavailable as error:  # the other measurements are wanted most while the database is down
        jobs_by_status.clear()
        deliveries_by_status.clear()
        log.warning("rows_not_counted", error=error.message)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _database_answers(state: ApiState) -> bool:
    try:
        with state.database.reading() as session:
            session.execute(select(1))
    except Unavailable:
        return False
    return True


def _count_jobs(state: ApiState) -> None:
    with state.database.reading() as session:
        counts = {row.status: row.number for row in session.execute(select(Job.status, func.count().label("number")).group_by(Job.status))}
    for status in JOB_STATUSES:
        jobs_by_status.labels(status).set(counts.get(status, 0))


def _count_deliveries(state: ApiState) -> None:
    status = case((WebhookDelivery.delivered_at.is_not(None), "delivered"), (WebhookDelivery.failed_at.is_not(None), "failed"), else_="pending").label("status")
    with state.database.reading() as session:
        counts = {row.status: row.number for row in session.execute(select(status, func.count().label("number")).group_by(status))}
    for name in ("pending", "delivered", "failed"):
        deliveries_by_status.labels(name).set(counts.get(name, 0))
