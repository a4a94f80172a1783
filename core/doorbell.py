"""The doorbell: a Celery message that says "look for work" and nothing else.

The database says who runs a job. A lost message costs latency, never a job: workers poll as well. So a broker that is
down is no error for whoever rings, and one that hangs holds nobody up.
"""

import threading

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from prometheus_client import Counter
from redis.backoff import NoBackoff
from redis.retry import Retry

from core.logging import get_logger
from core.settings import Settings

LOOK_FOR_WORK = "worker.look_for_work"
MOST_PENDING = 100
"""Rings that are kept while one is being published. More would wake no more workers."""

log = get_logger(__name__)
failed_rings = Counter("sdft_doorbell_failures", "Nudges that could not be published because the broker was unreachable.")


def celery_application(settings: Settings) -> Celery:
    """The Celery application shared by the API (which only sends) and the worker (which registers the tasks)."""
    app = Celery("sdft", broker=settings.resolved_redis_url)
    app.conf.update(
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "retry_on_timeout": True,
            # Publishing gives up quickly where it is refused (kombu's own default is 6 s); consumers have their own, endless retries.
            "max_retries": 2,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.1,
        },
    )
    return app


class Doorbell:
    """Rings from a thread of its own: a broker that neither answers nor refuses would hold each caller for most of a minute. Safe for
    several threads."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self._lock = threading.Lock()
        self._pending = 0
        self._is_publishing = False

    def ring(self) -> None:
        """Tell the workers to look for work. Call after the commit. Returns at once."""
        with self._lock:
            self._pending = min(self._pending + 1, MOST_PENDING)
            if self._is_publishing:
                return
            self._is_publishing = True
        try:
            threading.Thread(target=self._publish_pending, name="doorbell", daemon=True).start()
        except RuntimeError:  # no thread is to be had now; the polls find the job
            log.exception("doorbell_not_rung")
            with self._lock:
                self._is_publishing = False

    def close(self) -> None:
        """What has not been published yet is left to the workers' polls."""
        with self._lock:
            self._pending = 0
        self.app.close()

    def _publish_pending(self) -> None:
        """The thread, which ends when nothing is left to publish."""
        while self._take_one():
            try:
                published = publish(self.app)
            except Exception:  # a thread's boundary: the next ring begins anew
                log.exception("doorbell_failed_unexpectedly")
                published = False
            if not published:  # the others would only fail too, and the polls find their jobs
                with self._lock:
                    self._pending = 0

    def _take_one(self) -> bool:
        with self._lock:
            if self._pending == 0:
                self._is_publishing = False
                return False
            self._pending -= 1
            return True


def publish(app: Celery) -> bool:
    """One message, now. Returns False where the broker can't be reached; waits long where it hangs."""
    try:
        app.send_task(LOOK_FOR_WORK, retry=False)
    except OperationalError as error:
        failed_rings.inc()
        log.warning("doorbell_failed", error=str(error))
        return False
    return True


def broker_answers(url: str, timeout_seconds: float = 1) -> bool:
    """Whether the broker answers a ping (it refuses while it still loads its file), by a connection of its own: Celery's
    would retry for a while. `url` as Celery has it."""
    timeouts = {"socket_timeout": timeout_seconds, "socket_connect_timeout": timeout_seconds}
    with redis.Redis.from_url(url.replace("redis+socket://", "unix://", 1), retry=Retry(NoBackoff(), 0), **timeouts) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
