"""How many files and sockets this process may have open."""

import resource

from core.logging import get_logger

WANTED = 4096
NEEDED = 3000
"""By 800 connections: each may hold one to an inference server too, and SQLite takes two for each of its own."""

log = get_logger(__name__)


def allow_enough_descriptors() -> None:
    """Raise this process's own limit, which many systems set to 1,024, as far as the system allows; never lower it."""
    soft, hard = (float("inf") if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < WANTED:
        soft = min(WANTED, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), resource.RLIM_INFINITY if hard == float("inf") else int(hard)))
    if soft < NEEDED:
        log.warning("few_descriptors_allowed", allowed=int(soft), needed=NEEDED)
