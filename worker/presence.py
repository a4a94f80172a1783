"""Tells the database that this worker is there, so that the API can say when a queued job will start, and that nobody would train it.

At the same time it looks at the schema's revision: after a migration for another version the worker claims nothing more, finishes
what it runs, and is not counted as there.
"""

import socket
import time

from core.errors import ServiceError
from core.ids import new_token
from core.logging import get_logger
from core.schema_revision import describe_misfit, fit_of, schema_revision
from core.workers import TELL_SECONDS, leave, tell_presence
from worker.resources import Resources

log = get_logger(__name__)


class Presence:
    """`tell` may be called often; it writes every TELL_SECONDS."""

    def __init__(self, resources: Resources) -> None:
        self.worker_id = new_token()
        self._resources = resources
        self._devices = [list(group.devices) for group in resources.training_slots.groups]
        self._told_at: float | None = None

    def tell(self) -> None:
        """Raises Unavailable."""
        if self._told_at is not None and time.monotonic() - self._told_at < TELL_SECONDS:
            return
        self._compare_schema()
        if self._resources.schema_fits:
            with self._resources.database.transaction() as session:
                tell_presence(session, self.worker_id, socket.gethostname(), self._devices)
        self._told_at = time.monotonic()

    def _compare_schema(self) -> None:
        with self._resources.database.reading() as session:
            revision = schema_revision(session)
        fits = fit_of(revision) == "fits"
        if fits == self._resources.schema_fits:
            return
        self._resources.schema_fits = fits
        if fits:
            log.info("schema_fits_again", revision=revision)
        else:
            log.error("claiming_stopped", error=describe_misfit(revision))
            self.leave()

    def leave(self) -> None:
        """Where the database can be reached; else the others notice a little later."""
        try:
            with self._resources.database.transaction() as session:
                leave(session, self.worker_id)
        except ServiceError as error:
            log.warning("departure_not_told", error=error.message)
