"""Whether this server lives and can work: routes that need no key."""

import asyncio
from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from api.state import ApiState, State
from core.doorbell import broker_answers
from core.errors import Unavailable
from core.schema_revision import fit_of, schema_revision
from core.storage_condition import StorageCondition, storage_condition
from core.workers import workers_that_are_there

Check = Literal["ok", "unreachable", "older", "newer", "none", "not_writable", "full", "unknown"]

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
    ask = state.probes.ask
    database, broker, inference, storage = await asyncio.gather(
        ask("database", lambda: _database_checks(state), NOTHING_KNOWN),
        ask("broker", lambda: broker_answers(settings.resolved_redis_url), False),
        ask("inference", state.inference.healthy, False),
        ask("storage", lambda: storage_condition(settings, state.storage), UNANSWERED),
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
