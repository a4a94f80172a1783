"""What the one Celery task does. Its message says "look for work" and nothing else: the work stands in the database."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from core.errors import ServiceError
from core.jobs.leases import Claim
from core.jobs.transitions import claim_for_training, claim_for_validation
from core.logging import get_logger
from worker.resources import Resources
from worker.supervisor import train
from worker.validation import validate

log = get_logger(__name__)


def seek_work(resources: Resources) -> None:
    """Claim jobs and work on them until none waits or no slot is free. Validation first: it is short, and says early what
    is wrong with a file.

    Called by the pool's threads for every nudge and by the poll for lost ones. Training takes a training slot and
    validation a validation slot, so neither waits for the other. Database errors end the search: the poll goes on.
    """
    try:
        while not resources.stopping.is_set():
            if not (
                _work_on_next(resources, resources.validation_slots, claim_for_validation, validate)
                or _work_on_next(resources, resources.training_slots, claim_for_training, train)
            ):
                return
    except ServiceError as error:
        log.warning("database_unreachable", error=error.message)


def _work_on_next(
    resources: Resources,
    slots: threading.Semaphore,
    claim_next: Callable[[Session, float], Claim | None],
    work: Callable[[Resources, Claim, float], None],
) -> bool:
    """Claim one job and work on it to its end. Returns False where none waits or no slot is free."""
    with _free_slot(slots) as free:
        if not free:
            return False
        claimed_at = time.time()
        with resources.database.transaction() as session:
            claim = claim_next(session, resources.settings.lease_seconds)
        if claim is None:
            return False
        work(resources, claim, claimed_at)
        return True


@contextmanager
def _free_slot(slots: threading.Semaphore) -> Iterator[bool]:
    free = slots.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            slots.release()
