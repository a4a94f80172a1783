"""Wait until every base model of the catalogue is in the cache, for half an hour at most: for workers whose cache somebody else fills,
and who would fail the jobs that come before. `python -m worker.await_base_models`."""

import signal
import sys
import time

from core.logging import configure_logging, get_logger
from core.settings import Settings, get_settings

LOOK_SECONDS = 2.0
TELL_EVERY_LOOKS = 30
MOST_SECONDS = 1800.0
"""After which a worker starts without those that are still missing: jobs of the others must not wait for them."""

log = get_logger(__name__)


def unprepared(settings: Settings) -> list[str]:
    """The ids of those that are not there yet, or not whole."""
    return [entry.id for entry in settings.base_models if not entry.is_prepared(settings.cache_dir)]


def await_base_models(settings: Settings) -> None:
    until = time.monotonic() + MOST_SECONDS
    looks = 0
    while missing := unprepared(settings):
        if time.monotonic() > until:
            log.warning("base_models_missing", base_models=missing, cache_dir=str(settings.cache_dir))
            return
        if looks % TELL_EVERY_LOOKS == 0:
            log.info("base_models_awaited", base_models=missing, cache_dir=str(settings.cache_dir))
        looks += 1
        time.sleep(LOOK_SECONDS)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # a container's first process has no default
    settings = get_settings()
    configure_logging(settings)
    await_base_models(settings)


if __name__ == "__main__":
    main()
