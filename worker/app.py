"""The worker's Celery application: `celery --workdir DATA_DIR -A worker.app worker --pool threads`.

It imports no torch: it supervises. Threads: one for every training slot and two for validation, so that checking files
never waits behind training. Stop it with SIGTERM: trainers write a checkpoint and their jobs go back to the queue.
"""

from typing import Any

from celery.signals import setup_logging, worker_shutting_down

from core.doorbell import LOOK_FOR_WORK, celery_application
from core.logging import configure_logging
from core.settings import get_settings
from worker.devices import DevicesMissing
from worker.polling import PollStep
from worker.resources import resources_of, threads_needed
from worker.tasks import seek_work

app = celery_application(get_settings())
try:
    app.conf.update(worker_pool="threads", worker_concurrency=threads_needed(get_settings()))
except DevicesMissing as missing:
    raise SystemExit(f"The worker can't start: {missing}") from missing
app.steps["worker"].add(PollStep)


def look_for_work() -> None:
    seek_work(resources_of(app))


def _configure_logging(**options: Any) -> None:
    configure_logging(get_settings())


def _stop_supervisors(**options: Any) -> None:
    """Runs in the signal handler of the main thread, so it only sets a flag."""
    resources_of(app).stopping.set()


app.task(name=LOOK_FOR_WORK)(look_for_work)
setup_logging.connect(_configure_logging)
worker_shutting_down.connect(_stop_supervisors)
