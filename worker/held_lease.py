"""A claim kept alive from a thread of its own, whatever its holder is busy with: tokens, uploads, a slow trainer.

Every heartbeat the lease is renewed; about every second the row is read, for a cancellation, a pause or another's claim. `deadline`
is when this machine must have stopped working on it if no renewal gets through, a margin before anybody else may claim it: on a clock
that nobody sets (`machine_seconds`). Whether a lease has run out is the database's to say, by its own clock.

    KeptLease       the thread, the deadline, and writes under the lease
    ├── HeldLease       on a job
    └── ExportLease     on a model's export
"""

import contextvars
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.errors import ServiceError
from core.jobs.events import NewEvent, append_events
from core.jobs.leases import Claim, LeaseLost, assert_held, renew_lease
from core.logging import get_logger
from core.model_exports import ExportClaim, assert_export_held, renew_export
from core.tables.jobs import Job
from sdft_engine.contract.machine_clock import machine_seconds
from sdft_engine.contract.run_directory import StopReason
from worker.measurements import leases_lost
from worker.resources import Resources

MARGIN = 0.2
"""Share of the lease that is left when the deadline is over: for clocks that run unevenly and for a slow stop."""
RETRY_SECONDS = 0.5
FINISH_SECONDS = 22.0
"""How long after it was asked to stop a holder may still store what it has. A worker that ends has 30 seconds in all."""

log = get_logger(__name__)


class StopRequested(Exception):
    """The holder is asked to let go: because of a cancellation or a pause, or because this worker ends."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason = reason


class KeptLease(ABC):
    """`held` says what is held, for messages; `claimed_at` is `machine_seconds()` just before the claim was made."""

    def __init__(self, resources: Resources, held: str, claimed_at: float) -> None:
        self.held = held
        self.stop: StopReason | None = None
        """What the holder is asked for. A pause may be taken back."""
        self.untold: OSError | None = None
        """Why whoever is reported to could not be told of the newest change; None where it was."""
        self.stop_asked_at: float | None = None
        """When that was asked, in this machine's seconds; another reason begins anew."""
        self._requested: str | None = None
        self._resources = resources
        self._lease_seconds = resources.settings.lease_seconds
        self._heartbeat_seconds = resources.settings.heartbeat_seconds
        self._renewed_at = claimed_at
        self._on_change: Callable[[KeptLease], None] | None = None
        self._telling = threading.Lock()
        self._lost = threading.Event()
        self._settled = threading.Event()
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._keep,), name=f"lease-{held[-6:]}", daemon=True)

    @abstractmethod
    def renew(self, session: Session) -> str | None:
        """Extend the lease from now. Returns the stop that was requested ("cancel" or "pause"), if any. Raises LeaseLost."""

    @abstractmethod
    def read(self, session: Session) -> str | None:
        """The same without extending it: writes nothing."""

    @property
    def deadline(self) -> float:
        return self._renewed_at + self._lease_seconds * (1 - MARGIN)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._settled.set()
        self._thread.join()
        if self._lost.is_set():
            leases_lost.inc()

    def report_to(self, on_change: Callable[["KeptLease"], None]) -> None:
        """Call `on_change` now, and from the lease's thread whenever `deadline` or `stop` changed; one call at a time."""
        with self._telling:
            on_change(self)
            self._on_change = on_change

    def check(self) -> None:
        """Raises LeaseLost once it is not ours any more, or may not be."""
        if self._lost.is_set() or machine_seconds() > self.deadline:
            self._lost.set()
            raise LeaseLost(f"{self.held} is no longer held by this attempt")

    def check_wanted(self) -> None:
        """Raises LeaseLost, or StopRequested where the holder should let go."""
        self.check()
        if self.stop is not None:
            raise StopRequested(self.stop)

    def check_in_time(self) -> None:
        """The same for what should be brought to its end where it can: StopRequested only when it took too long after the request. A
        pause waits for as long as it takes."""
        self.check()
        stop, asked_at = self.stop, self.stop_asked_at
        if stop in ("cancel", "requeue") and asked_at is not None and machine_seconds() - asked_at > FINISH_SECONDS:
            raise StopRequested(stop)

    def write(self, change: Callable[[Session], None]) -> None:
        """Run `change` in a transaction, again while the database can't be reached. Raises LeaseLost."""
        while not self.try_write(change):
            time.sleep(RETRY_SECONDS)

    def try_write(self, change: Callable[[Session], None]) -> bool:
        """Run `change` in a transaction. Returns False where the database can't be reached. Raises LeaseLost."""
        self.check()
        try:
            with self._resources.database.transaction() as session:
                change(session)
        except ServiceError as error:  # unreachable, busy or full
            log.warning("database_unreachable", error=error.message, seconds_left=round(self.deadline - machine_seconds(), 1))
            return False
        except LeaseLost:
            self._lost.set()
            raise
        return True

    def settle(self, change: Callable[[Session], None]) -> None:
        """The last write: `change` lets go. No renewal follows. Raises LeaseLost."""
        self._settled.set()
        self._thread.join()
        self.write(change)

    def _keep(self) -> None:
        tick_seconds = min(1.0, self._heartbeat_seconds)
        while not self._settled.wait(tick_seconds):
            before = (self._renewed_at, self.stop)
            try:
                self._look()
            except ServiceError as error:
                log.warning("lease_not_renewed", error=error.message, seconds_left=round(self.deadline - machine_seconds(), 1))
            except LeaseLost:
                self._lost.set()
            except Exception:  # the thread must live: without it the lease would end although all else works
                log.exception("lease_not_renewed")
            if self._lost.is_set() or machine_seconds() > self.deadline:
                self._lost.set()
                log.warning("lease_lost")
                return
            self._stop_as(self._wanted())  # also where the database can't be reached: a worker that ends has half a minute
            if before != (self._renewed_at, self.stop):
                self._tell()

    def _look(self) -> None:
        """Renew the lease where it is time, else only read the row."""
        asked_at = machine_seconds()
        if asked_at - self._renewed_at >= self._heartbeat_seconds:
            with self._resources.database.transaction() as session:
                self._requested = self.renew(session)
            self._renewed_at = asked_at
        else:
            with self._resources.database.reading() as session:
                self._requested = self.read(session)

    def _stop_as(self, wanted: StopReason | None) -> None:
        if wanted is None:
            self.stop_asked_at = None
        elif wanted != self.stop:
            self.stop_asked_at = machine_seconds()
        self.stop = wanted

    def _wanted(self) -> StopReason | None:
        if self._requested == "cancel":
            return "cancel"
        if self._resources.stopping.is_set():
            return "requeue"
        return "pause" if self._requested == "pause" else None

    def _tell(self) -> None:
        with self._telling:
            if self._on_change is None:
                return
            try:
                self._on_change(self)
                self.untold = None
            except OSError as error:  # a full disk: the trainer then stops by itself at the deadline that it knows
                log.error("control_not_written", error=str(error))
                self.untold = error


class HeldLease(KeptLease):
    """On a job."""

    def __init__(self, resources: Resources, claim: Claim, claimed_at: float) -> None:
        super().__init__(resources, f"job {claim.job_id}", claimed_at)
        self.claim = claim

    def renew(self, session: Session) -> str | None:
        return renew_lease(session, self.claim, self._lease_seconds)

    def read(self, session: Session) -> str | None:
        row = session.execute(select(Job.stop_requested, Job.lease_token).where(Job.id == self.claim.job_id)).one_or_none()
        if row is None or row.lease_token != self.claim.lease_token:
            raise LeaseLost(f"{self.held} is no longer held by this attempt")
        requested: str | None = row.stop_requested
        return requested

    def warn(self, message: str, data: dict[str, Any] | None = None) -> None:
        """Add an event to the job, once, however often it has to be written. Raises LeaseLost."""
        event = NewEvent(message, "warn", data=data)

        def tell(session: Session) -> None:
            assert_held(session, self.claim)
            append_events(session, self.claim.job_id, [event])

        self.write(tell)


class ExportLease(KeptLease):
    """On a model's export. Nobody cancels one: deleting the model takes its row away."""

    def __init__(self, resources: Resources, claim: ExportClaim, claimed_at: float) -> None:
        super().__init__(resources, f"the {claim.format} export of {claim.model_id}", claimed_at)
        self.claim = claim

    def check_wanted(self) -> None:
        """The same, and at once where this worker ends: a lease's thread that waits for the database would tell too late."""
        self.check()
        if self._resources.stopping.is_set():
            raise StopRequested("requeue")

    def renew(self, session: Session) -> None:
        renew_export(session, self.claim, self._lease_seconds)

    def read(self, session: Session) -> None:
        assert_export_held(session, self.claim)
