"""What is needed no more is removed here, by a thread of every worker, soon after its start and then every hour.

Whatever a rule does can be done twice, and by two workers at once: rows change under conditions and before their objects go, and
what is gone already is no error. So nobody has to be the one that collects, and every machine's own directories are looked after.
A day's grace covers whatever is written before its row is.
"""

import time
from collections.abc import Callable

from core.errors import ServiceError
from core.logging import get_logger
from core.model_exports import forget_old_exports
from core.webhooks.deliveries import delete_old_deliveries
from worker.checkpoint_retention import delete_surplus_models, discard_states_of_ended_jobs, discard_superseded_states
from worker.old_directories import remove_export_directories, remove_idle_rollout_adapters, remove_old_runs, remove_unserved_adapters
from worker.resources import Resources
from worker.storage_owner import OWNER_KEY, database_owns_storage
from worker.stored_objects import OBJECT_PREFIXES, delete_unreferenced

FIRST_ROUND_SECONDS = 60.0
"""After a worker's start, which has more urgent things to do."""
GRACE_SECONDS = 86_400.0
DELIVERIES_AT_A_TIME = 1000

log = get_logger(__name__)


class Collector:
    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def run(self) -> None:
        """The thread's loop, until the process ends; at once where nothing is to be collected."""
        every_seconds = self._resources.settings.collect_every_seconds
        pause_seconds = min(FIRST_ROUND_SECONDS, every_seconds)
        while every_seconds and not self._resources.stopping.wait(pause_seconds):
            pause_seconds = every_seconds
            try:
                if self._resources.may_claim:  # a newer schema may refer to objects in ways that this program doesn't know
                    self.collect()
            except ServiceError as error:
                log.warning("collection_postponed", error=error.message)
            except Exception:
                log.exception("collection_failed_unexpectedly")

    def collect(self) -> dict[str, int]:
        """One round. A rule that fails does not keep the others from their work. Returns how much each removed, in order."""
        if not database_owns_storage(self._resources):
            log.error("storage_of_another_database", remedy=f"give this service a storage of its own, or delete the object {OWNER_KEY!r} in it")
            return {}
        removed: dict[str, int] = {}
        for name, rule in RULES.items():
            if not self._resources.may_claim:
                break
            try:
                removed[name] = rule(self._resources)
            except ServiceError as error:
                log.warning("collection_postponed", rule=name, error=error.message)
            except Exception:
                log.exception("collection_failed_unexpectedly", rule=name)
            if removed.get(name):
                log.info("collected", rule=name, count=removed[name])
        return removed


def discard_abandoned_uploads(resources: Resources) -> int:
    return resources.storage.discard_abandoned_uploads(GRACE_SECONDS)


def delete_old_exports(resources: Resources) -> int:
    with resources.database.transaction() as session:
        keys = forget_old_exports(session, resources.settings.keep_exports_seconds)
    delete_unreferenced(resources.database, resources.storage, keys)
    return len(keys)


def forget_old_deliveries(resources: Resources) -> int:
    """In small transactions: on SQLite everybody else's writes wait for each."""
    deleted = 0
    while not resources.stopping.is_set():
        with resources.database.transaction() as session:
            batch = delete_old_deliveries(session, DELIVERIES_AT_A_TIME)
        deleted += batch
        if batch < DELIVERIES_AT_A_TIME:
            break
    return deleted


def delete_objects_without_rows(resources: Resources) -> int:
    """Of workers and API processes that were killed between an object and its row, and what could not be deleted after its row."""
    before = time.time() - GRACE_SECONDS
    deleted = 0
    for prefix in OBJECT_PREFIXES:
        for page in resources.storage.list_objects(prefix):
            if resources.stopping.is_set():
                return deleted
            old = [listed.key for listed in page if listed.modified_at < before]
            deleted += len(delete_unreferenced(resources.database, resources.storage, old)) if old else 0
    return deleted


RULES: dict[str, Callable[[Resources], int]] = {
    "superseded_training_states": discard_superseded_states,
    "training_states_of_ended_jobs": discard_states_of_ended_jobs,
    "surplus_checkpoint_models": delete_surplus_models,
    "old_exports": delete_old_exports,
    "abandoned_uploads": discard_abandoned_uploads,
    "objects_without_rows": delete_objects_without_rows,
    "old_webhook_deliveries": forget_old_deliveries,
    "old_runs": remove_old_runs,
    "export_directories": remove_export_directories,
    "unserved_adapters": remove_unserved_adapters,
    "idle_rollout_adapters": remove_idle_rollout_adapters,
}
