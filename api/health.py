"""Whether this server lives and can work: routes that need no key."""

import asyncio
from collections.abc import Callable
from typing import Literal, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Response
from pydantic import BaseModel

from api.state import ApiState, State
from core.doorbell import broker_answers
from core.errors import Unavailable
from core.schema_revision import fit_of, schema_revision
from core.storage_condition import StorageCondition, storage_condition
from core.workers import workers_that_are_there

PROBE_SECONDS = 4.0
"""After which what has not answered counts as unreachable, so that a probe of an orchestrator gets its answer."""

Check = Literal["ok", "unreachable", "older", "newer", "none", "not_writable", "full", "unknown"]
Answer = TypeVar("Answer")

NOTHING_KNOWN: dict[str, Check] = {}
UNANSWERED: StorageCondition = "unreachable"

router = APIRouter(tags=["operation"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """`degraded` names what doesn't work. Without broker, inference server, workers or room in storage, what can be done is done."""

    status: Literal["ok", "degraded", "unavailable"]
    degraded: list[str]
    checks: dict[str, Check]


@router.get("/healthz")
async def healthz() -> Health:
    return Health()


@router.get("/readyz")
async def readyz(state: State, response: Response) -> Readiness:
    """503 only where no request can be answered: the database is down, or its schema is older than this program. A newer one is what
    a deploy looks like to the processes that it is about to replace; they go on answering until then."""
    settings = state.settings
    database, broker, inference, storage = await asyncio.gather(
        _ask(state, lambda: _database_checks(state), NOTHING_KNOWN),
        _ask(state, lambda: broker_answers(settings.resolved_redis_url), False),
        _ask(state, state.inference.healthy, False),
        _ask(state, lambda: storage_condition(settings, state.storage), UNANSWERED),
    )
    checks: dict[str, Check] = {
        "database": "ok" if database else "unreachable",
        "schema": database.get("schema", "unknown"),
        "broker": "ok" if broker else "unreachable",
        "inference": "ok" if inference else "unreachable",
        "workers": database.get("workers", "unknown"),
        "storage": storage,
    }
    degraded = [name for name, check in checks.items() if check not in ("ok", "unknown")]
    unavailable = checks["database"] != "ok" or checks["schema"] == "older"
    if unavailable:
        response.status_code = 503
        response.headers["retry-after"] = "2"
    return Readiness(status="unavailable" if unavailable else "degraded" if degraded else "ok", degraded=degraded, checks=checks)


async def _ask(state: ApiState, probe: Callable[[], Answer], otherwise: Answer) -> Answer:
    """The probe's answer, or `otherwise` where there is none in time. Its thread, which may hang on, is none that requests need."""
    answer = otherwise
    with anyio.move_on_after(PROBE_SECONDS):
        answer = await anyio.to_thread.run_sync(probe, abandon_on_cancel=True, limiter=state.probe_threads)
    return answer


def _database_checks(state: ApiState) -> dict[str, Check]:
    """Of what only the database knows; empty where it can't be reached."""
    try:
        with state.database.reading() as session:
            fit = fit_of(schema_revision(session))
            if fit != "fits":
                return {"schema": fit}
            slots = sum(worker.slots for worker in workers_that_are_there(session))
            return {"schema": "ok", "workers": "ok" if slots else "none"}
    except Unavailable:
        return {}
