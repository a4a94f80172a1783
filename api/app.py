"""The HTTP face. `uvicorn api.app:app` serves it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI

from api import error_handlers, health
from api.authentication import Authentication
from api.completions import routes as completions
from api.files import routes as files
from api.files.service import delete_expired_files
from api.fine_tuning import base_models
from api.fine_tuning.jobs import routes as jobs
from api.models import routes as models
from api.request_context import RequestContext
from api.request_limits import RequestLimits
from api.shutdown import called_when_told_to_stop
from api.state import ApiState
from api.trusted_hosts import TrustedHosts
from api.webhooks import routes as webhooks
from core.logging import configure_logging, get_logger
from core.settings import Settings, get_settings

EXPIRY_INTERVAL_SECONDS = 60

log = get_logger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The application. Its database, storage and clients are opened when it starts and closed when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_logging(settings)
        _adopt_server_logs()
        app.state.api = state = ApiState.open(settings)
        expiring = asyncio.create_task(_expire_files(state))
        try:
            with called_when_told_to_stop(state.event_feed.close):
                yield
        finally:
            expiring.cancel()
            await asyncio.gather(expiring, return_exceptions=True)
            await state.aclose()

    app = FastAPI(title="sdft", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    error_handlers.install(app)
    for router in (health.router, files.router, base_models.router, jobs.router, models.router, completions.router, webhooks.router):
        app.include_router(router)
    app.add_middleware(RequestLimits, max_bytes=settings.max_request_bytes)
    app.add_middleware(Authentication)
    app.add_middleware(TrustedHosts, allowed_hosts=settings.allowed_hosts)
    app.add_middleware(RequestContext)  # the last one added is the outermost
    return app


def _adopt_server_logs() -> None:
    """uvicorn's lines in the service's own format; its access log repeats ours."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"


async def _expire_files(state: ApiState) -> None:
    while True:
        try:
            deleted = await anyio.to_thread.run_sync(delete_expired_files, state)
            if deleted:
                log.info("expired_files_deleted", count=deleted)
        except Exception:  # a boundary: the next round may succeed
            log.exception("expired_files_not_deleted")
        await asyncio.sleep(EXPIRY_INTERVAL_SECONDS)


app = create_app(get_settings())
