"""The HTTP face. `uvicorn api.app:app` serves it."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from api import error_handlers, health, measurements
from api.authentication import Authentication
from api.completions import routes as completions
from api.descriptors import allow_enough_descriptors
from api.files import routes as files
from api.files.service import delete_expired_files
from api.fine_tuning import base_models
from api.fine_tuning.jobs import routes as jobs
from api.idempotency import delete_expired_records
from api.models import routes as models
from api.organization import audit_logs
from api.organization.api_keys import routes as api_keys
from api.organization.projects import routes as projects
from api.rate_limits import RateLimits
from api.request_context import RequestContext
from api.request_limits import RequestLimits
from api.scopes import ScopeCheck
from api.shutdown import called_when_told_to_stop
from api.slow_bodies import SlowBodies
from api.state import ApiState
from api.trusted_hosts import TrustedHosts
from api.webhooks import routes as webhooks
from core.errors import Unavailable
from core.logging import configure_logging, get_logger
from core.schema_revision import SchemaDoesNotFit, require_fitting_schema
from core.settings import Settings, get_settings
from core.tracing import send_traces, start_tracing, tracing_wanted

EXPIRY_INTERVAL_SECONDS = 60

log = get_logger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The application. Its database, storage and clients are opened when it starts and closed when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_logging(settings)
        _adopt_server_logs()
        start_tracing("sdft-api")
        allow_enough_descriptors()
        app.state.api = state = ApiState.open(settings)
        await anyio.to_thread.run_sync(_refuse_another_schema, state)
        expiring = asyncio.create_task(_delete_what_expires(state))
        try:
            with called_when_told_to_stop(state.event_feed.close):
                yield
        finally:
            expiring.cancel()
            await asyncio.gather(expiring, return_exceptions=True)
            await state.aclose()
            await anyio.to_thread.run_sync(send_traces)

    app = FastAPI(title="sdft", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan, telemetry=_telemetry())
    error_handlers.install(app)
    for resource in (jobs, completions, files, models, health, measurements, base_models, webhooks, projects, api_keys, audit_logs):  # the busiest first
        app.include_router(resource.router)
    app.add_middleware(SlowBodies)
    app.add_middleware(RequestLimits, max_bytes=settings.max_request_bytes)
    app.add_middleware(ScopeCheck)
    if settings.rate_limit_requests_per_minute:
        app.add_middleware(RateLimits, requests_per_minute=settings.rate_limit_requests_per_minute)
    app.add_middleware(Authentication)
    app.add_middleware(TrustedHosts, allowed_hosts=settings.allowed_hosts)
    app.add_middleware(RequestContext)  # the last one added is the outermost
    return app


def _telemetry() -> TelemetryConfig:
    """FastAPI's own spans, of requests alone: measurements are Prometheus' (api/measurements.py), and providers are core.tracing's."""
    probes = ("/healthz", "/readyz", "/metrics")
    return {
        "tracing": tracing_wanted(),
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope["path"] in probes,
    }


def _refuse_another_schema(state: ApiState) -> None:
    """Raises SchemaDoesNotFit. A database that can't be asked now is no reason not to start: `/readyz` goes on asking."""
    try:
        require_fitting_schema(state.database)
    except SchemaDoesNotFit as error:
        log.error("schema_does_not_fit", error=str(error))
        raise
    except Unavailable as error:
        log.warning("schema_not_compared", error=error.message)


def _adopt_server_logs() -> None:
    """uvicorn's lines in the service's own format; its access log repeats ours."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"


async def _delete_what_expires(state: ApiState) -> None:
    while True:
        for what, delete in {"files": delete_expired_files, "idempotency_records": delete_expired_records}.items():
            try:  # files wait for storage, and may for long
                deleted = await state.storage_threads.run(delete, state, patient=True)
                if deleted:
                    log.info("expired_deleted", what=what, count=deleted)
            except Exception:  # a boundary: the next round may succeed
                log.exception("expired_not_deleted", what=what)
        await asyncio.sleep(EXPIRY_INTERVAL_SECONDS)


app = create_app(get_settings())
gc.collect()
gc.freeze()  # modules and routes stay: looked through again and again, they would hold every request up for a tenth of a second
