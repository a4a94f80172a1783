"""What a worker does without being told: release expired leases, find jobs whose nudge was lost, verify models,
make the forms of models that were asked for, deliver webhooks, remove what is needed no more.

A Celery bootstep starts these threads before the broker is connected, so jobs run with the broker down too.
"""

import threading
from typing import Any

from celery import bootsteps

from core.errors import ServiceError
from core.logging import get_logger
from core.schema_revision import SchemaDoesNotFit, require_fitting_schema
from core.tracing import TracingNotInstalled, send_traces, start_tracing
from worker.expired_leases import free_expired_leases, work_is_waiting
from worker.garbage_collection import Collector
from worker.measurements import serve_measurements
from worker.model_exports import Exporter
from worker.presence import Presence
from worker.resources import Resources, resources_of
from worker.tasks import seek_work
from worker.verification import Verifier
from worker.webhook_delivery import Deliverer

log = get_logger(__name__)


class Poll:
    """Looks every `poll_seconds`, and searches for work in threads of its own: a search may train for hours."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._presence = Presence(resources)
        self._most_searches = len(resources.training_slots.groups) + len(resources.validation_slots.groups)
        self._searches: list[threading.Thread] = []

    def run(self) -> None:
        """The thread's loop, until the process ends."""
        while True:
            try:
                self.look()
            except ServiceError as error:
                log.warning("database_unreachable", error=error.message)
            except Exception:
                log.exception("poll_failed_unexpectedly")
            if self._resources.stopping.wait(self._resources.settings.poll_seconds):
                self._presence.leave()
                return

    def look(self) -> None:
        self._presence.tell()
        if not self._resources.may_claim:
            return
        free_expired_leases(self._resources)
        self._searches = [thread for thread in self._searches if thread.is_alive()]
        if len(self._searches) < self._most_searches and work_is_waiting(self._resources):
            search = threading.Thread(target=seek_work, args=(self._resources,), name="search")
            search.start()
            self._searches.append(search)

    def wait_for_searches(self) -> None:
        for thread in self._searches:
            thread.join()


class PollStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Starts with the worker, before its consumer; ends when the consumer has ended."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._resources = resources_of(worker.app)
        self._poll = Poll(self._resources)
        self._thread = threading.Thread(target=self._poll.run, name="poll")
        self._exporter = threading.Thread(target=Exporter(self._resources).run, name="exporter")
        self._deliverer = threading.Thread(target=Deliverer(self._resources).run, name="deliverer")

    def start(self, worker: Any) -> None:
        self._refuse_another_schema()
        try:
            start_tracing("sdft-worker")
        except TracingNotInstalled as error:
            log.error("tracing_not_installed", error=str(error))
            raise SystemExit(1) from error
        serve_measurements(self._resources.settings)
        self._thread.start()
        threading.Thread(target=Verifier(self._resources).run, name="verifier", daemon=True).start()
        threading.Thread(target=Collector(self._resources).run, name="collector", daemon=True).start()
        self._exporter.start()
        self._deliverer.start()

    def _refuse_another_schema(self) -> None:
        """Ends the process. A database that can't be asked now is asked again by the poll."""
        try:
            require_fitting_schema(self._resources.database)
        except SchemaDoesNotFit as error:
            log.error("schema_does_not_fit", error=str(error))
            raise SystemExit(1) from error
        except ServiceError as error:
            log.warning("database_unreachable", error=error.message)

    def stop(self, worker: Any) -> None:
        """Wait for the searches: their supervisors were told already when the shutdown began."""
        self._resources.stopping.set()
        for thread in (self._thread, self._exporter, self._deliverer):
            if thread.is_alive():
                thread.join()
        self._poll.wait_for_searches()
        send_traces()
