"""Webhook events that are due are sent from here, several at a time, to each endpoint one after the other.

A thread looks for them every second; each that it finds gets a thread of its own, which goes on to the next one when it is done.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.orm import Session

from core.errors import ServiceError
from core.logging import get_logger
from core.webhooks.deliveries import DeliveryClaim, claim_delivery, delivery_is_due, record_delivered, record_failure, record_gone
from core.webhooks.sending import TOTAL_SECONDS, NotDelivered, send
from worker.resources import Resources

LOOK_SECONDS = 1.0
LEASE_SECONDS = 60.0
"""Well above what sending takes."""
MAX_AT_A_TIME = 8
SETTLE_SECONDS = 30.0
"""How long a database that is away is asked again to record what became of a delivery; after that it is sent again."""
GONE = 410
"""By which an endpoint asks for no more."""

log = get_logger(__name__)


class Deliverer:
    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._slots = threading.Semaphore(MAX_AT_A_TIME)
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        """The thread's loop, until the process ends. What is being sent then may end; what hangs, in a name's lookup say, is left
        to its lease."""
        while not self._resources.stopping.wait(LOOK_SECONDS):
            try:
                if self._resources.may_claim:
                    self.start_due()
            except ServiceError as error:
                log.warning("database_unreachable", error=error.message)
            except Exception:
                log.exception("webhook_delivery_failed_unexpectedly")
        deadline = time.monotonic() + TOTAL_SECONDS
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))

    def start_due(self) -> None:
        """A thread for each delivery that is due, as far as there are slots."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        while self._slots.acquire(blocking=False):
            claim = None
            try:
                claim = self._claim()
            finally:
                if claim is None:
                    self._slots.release()
            if claim is None:
                return
            thread = threading.Thread(target=self._deliver_from, args=(claim,), name="webhook", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _claim(self) -> DeliveryClaim | None:
        with self._resources.database.reading() as session:
            if not delivery_is_due(session):
                return None
        with self._resources.database.transaction() as session:
            return claim_delivery(session, LEASE_SECONDS)

    def _deliver_from(self, first: DeliveryClaim) -> None:
        """This one, and then others while any is due."""
        claim: DeliveryClaim | None = first
        try:
            while claim is not None:
                self.deliver(claim)
                claim = None if self._resources.stopping.is_set() else self._claim()
        except ServiceError as error:  # the look-out goes on
            log.warning("database_unreachable", error=error.message)
        except Exception:
            log.exception("webhook_delivery_failed_unexpectedly")
        finally:
            self._slots.release()

    def deliver(self, claim: DeliveryClaim) -> None:
        """Send it, and record what became of it. No transaction is open while it is sent."""
        status: int | None = None
        try:
            status = send(claim.url, claim.delivery_id, claim.body, claim.secrets, allow_insecure=self._resources.settings.webhook_allow_insecure)
            reason = f"the endpoint answered {status}"
        except NotDelivered as error:
            reason = str(error)
        except Exception as error:  # the boundary of one delivery: left as it is, it would come first again and again
            log.exception("webhook_delivery_failed_unexpectedly", webhook_id=claim.delivery_id)
            reason = f"sending it failed with an internal error ({type(error).__name__})"
        fields = {"webhook_id": claim.delivery_id, "endpoint": claim.endpoint_id, "event_type": claim.event_type, "attempt": claim.attempt}
        if status is not None and 200 <= status < 300:
            self._settle(lambda session: record_delivered(session, claim, status))
            log.info("webhook_delivered", status=status, **fields)
        elif status == GONE:
            self._settle(lambda session: record_gone(session, claim, reason, status))
            log.warning("webhook_endpoint_disabled", reason=reason, **fields)
        else:
            retry_seconds = self._settle(lambda session: record_failure(session, claim, reason, status))
            log.warning("webhook_not_delivered", reason=reason, retry_seconds=retry_seconds, **fields)

    def _settle(self, change: Callable[[Session], Any]) -> Any:
        """Record it in a transaction, again for a while where the database is away. Raises ServiceError in the end."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                with self._resources.database.transaction() as session:
                    return change(session)
            except ServiceError:
                if time.monotonic() > deadline or self._resources.stopping.wait(1):
                    raise
