"""Tells the database that this worker is there, so that the API can say when a queued job will start, and that nobody would train it."""

import socket
import time

from core.errors import ServiceError
from core.ids import new_token
from core.logging import get_logger
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
        with self._resources.database.transaction() as session:
            tell_presence(session, self.worker_id, socket.gethostname(), self._devices)
        self._told_at = time.monotonic()

    def leave(self) -> None:
        """At the end, where the database can be reached; else the others notice a little later."""
        try:
            with self._resources.database.transaction() as session:
                leave(session, self.worker_id)
        except ServiceError as error:
            log.warning("departure_not_told", error=error.message)
