"""Object storage that is away for a while costs a job time, and neither its run nor what it has trained."""

import time
from collections.abc import Callable
from typing import TypeVar

from core.errors import StorageUnavailable
from core.logging import get_logger
from worker.held_lease import HeldLease
from worker.interruptible import interruptible

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
PATIENCE_SECONDS = 3600.0
"""Longer, and the job goes back to the queue: whoever takes it up next may reach the storage."""
LOOK_SECONDS = 0.2

Result = TypeVar("Result")

log = get_logger(__name__)


def through_outages(lease: HeldLease, work: Callable[[], Result], check: Callable[[], None] | None = None) -> Result:
    """The result of `work`, which is done again from its beginning while the storage fails. The lease is held meanwhile, and the job
    has an event that says why nothing happens.

    While `work` runs `check` is called, `lease.check_wanted` by default: where it raises, `work` is left to itself (see interruptible).
    Raises StorageUnavailable after an hour, LeaseLost, and StopRequested, also where it is asked to stop while it waits.
    """
    began: float | None = None
    pause_seconds = FIRST_PAUSE_SECONDS
    while True:
        try:
            return interruptible(work, check or lease.check_wanted)
        except StorageUnavailable as error:
            if began is None:
                began = time.monotonic()
                lease.warn("The object storage can't be reached or fails; the job waits for it")
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise
            log.warning("storage_awaited", error=error.message, pause_seconds=pause_seconds)
        until = time.monotonic() + pause_seconds
        while time.monotonic() < until:
            lease.check_wanted()
            time.sleep(LOOK_SECONDS)
        pause_seconds = min(LONGEST_PAUSE_SECONDS, 2 * pause_seconds)
