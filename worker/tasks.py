"""What the one Celery task does. Its message says "look for work" and nothing else: the work stands in the database."""

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.orm import Session
from structlog.contextvars import bound_contextvars

from core.errors import ServiceError
from core.jobs.leases import Claim
from core.jobs.transitions import claim_for_training, claim_for_validation
from core.logging import get_logger
from core.tables.jobs import Job
from core.tracing import continued_span
from sdft_engine.contract.machine_clock import machine_seconds
from worker.devices import DeviceGroup, Slots
from worker.resources import Resources
from worker.supervisor import train
from worker.validation import validate

log = get_logger(__name__)


def seek_work(resources: Resources) -> None:
    """Claim jobs and work on them until none waits or no slot is free. Validation first: it is short, and says early what
    is wrong with a file.

    Called by the pool's threads for every nudge and by the poll for lost ones. Training takes a training slot and
    validation a validation slot, so neither waits for the other. Errors end the search: the poll goes on.
    """
    settings = resources.settings

    def next_to_train(session: Session) -> Claim | None:
        return claim_for_training(session, settings.lease_seconds, settings.project_max_running_jobs)

    def next_to_validate(session: Session) -> Claim | None:
        return claim_for_validation(session, settings.lease_seconds)

    try:
        while resources.may_claim:
            if not (
                _work_on_next(resources, resources.validation_slots, next_to_validate, validate)
                or _work_on_next(resources, resources.training_slots, next_to_train, train)
            ):
                return
    except ServiceError as error:
        log.warning("database_unreachable", error=error.message)
    except Exception:  # the boundary of a thread: of the pool's, or of the poll's searches
        log.exception("search_failed_unexpectedly")


def _work_on_next(
    resources: Resources, slots: Slots, claim_next: Callable[[Session], Claim | None], work: Callable[[Resources, Claim, float, DeviceGroup], None]
) -> bool:
    """Claim one job and work on it to its end. Returns False where none waits or no slot is free."""
    with slots.take() as group:
        if group is None:
            return False
        claimed_at = machine_seconds()
        with resources.database.transaction() as session:
            claim = claim_next(session)
            origin = (claim and session.scalar(select(Job.origin).where(Job.id == claim.job_id))) or {}
        if claim is None:
            return False
        with (
            bound_contextvars(request_id=origin.get("request_id")),
            continued_span(f"{work.__name__} job", origin.get("trace_parent"), **{"sdft.job_id": claim.job_id, "sdft.attempt": claim.attempt}),
        ):
            work(resources, claim, claimed_at, group)
        return True
