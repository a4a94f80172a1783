"""Jobs whose worker was lost go back to where another attempt finds them, and jobs whose nudge was lost are found."""

from core.jobs.leases import lease_has_expired
from core.jobs.queue import work_waits
from core.jobs.transitions import release_expired_leases
from core.logging import get_logger
from worker.measurements import expired_leases_released
from worker.resources import Resources

log = get_logger(__name__)


def free_expired_leases(resources: Resources) -> None:
    """Raises Unavailable."""
    with resources.database.reading() as session:
        if not lease_has_expired(session):
            return
    with resources.database.transaction() as session:
        freed = release_expired_leases(session, resources.settings.max_lost_leases)
    expired_leases_released.inc(len(freed))
    for job_id in freed:
        log.warning("expired_lease_released", job_id=job_id)


def work_is_waiting(resources: Resources) -> bool:
    """Raises Unavailable."""
    with resources.database.reading() as session:
        return work_waits(session, resources.settings.project_max_running_jobs)
