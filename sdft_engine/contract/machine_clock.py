"""The clock by which the processes of one machine compare moments: worker and trainer, for the end of a lease."""

import time

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the first is Linux's, and goes on while the machine is suspended


def machine_seconds() -> float:
    """Seconds since this machine was started. The same for all its processes, and nobody sets it: the time of day may be set back by an
    hour while a lease runs."""
    return time.clock_gettime(_CLOCK)
