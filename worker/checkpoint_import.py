"""Complete checkpoints go to storage as they appear, so that any machine can resume, and become servable models.

A step has one row. Where a resumed attempt writes a step again (its stored checkpoint was damaged), the row points to
the new state; the checkpoint's model stays what it was: models are immutable.
"""

import json
import time
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.archives import store_directory
from core.database import unix_now
from core.errors import StorageUnavailable
from core.ids import new_id, new_token
from core.jobs.events import append_event
from core.jobs.leases import assert_held
from core.jobs.transitions import forgive_losses
from core.logging import get_logger
from core.storage import Check, ObjectDamaged, StoredObject
from core.tables.jobs import Checkpoint
from core.tables.models import Model
from sdft_engine.contract import sealed_directory
from sdft_engine.contract.errors import CheckpointDamaged
from sdft_engine.contract.run_directory import RunDirectory
from worker.adapter_archives import store_adapter
from worker.held_lease import HeldLease, StopRequested
from worker.interruptible import interruptible
from worker.measurements import checkpoints_stored
from worker.resources import Resources
from worker.run_preparation import PreparedRun
from worker.stored_objects import check_stored, delete_unreferenced
from worker.trained_models import new_trained_model

AFTER_OUTAGE_SECONDS = 15.0

log = get_logger(__name__)


class CheckpointImport:
    def __init__(self, resources: Resources, run: RunDirectory, lease: HeldLease, prepared: PreparedRun) -> None:
        self._resources = resources
        self._run = run
        self._lease = lease
        self._prepared = prepared
        self._job = prepared.job
        self._seen: set[int] = set()
        self._not_before = 0.0

    def import_if_possible(self) -> None:
        """`import_new` while the trainer runs, which goes on where the storage fails; what waits is imported later. An upload is dropped
        when the attempt is to stop: once the trainer has, the newest checkpoint goes first. Raises LeaseLost, StorageFull."""
        check = self._lease.check_wanted
        if self._lease.stop is not None or time.monotonic() < self._not_before or not self._waiting():
            return
        try:
            interruptible(lambda: self.import_new(check), check)
        except StopRequested:
            log.info("checkpoint_upload_dropped")
        except StorageUnavailable as error:
            self._not_before = time.monotonic() + AFTER_OUTAGE_SECONDS
            log.warning("checkpoint_not_stored", error=error.message, retry_seconds=AFTER_OUTAGE_SECONDS)

    def import_new(self, check: Check | None = None) -> None:
        """Store every checkpoint that is complete and not stored yet; once the attempt is to stop, only the newest of them, so that a
        backlog does not hold it up. `check`, `lease.check_in_time` by default, is called all the while. Raises what it raises, LeaseLost,
        StorageFull or StorageUnavailable."""
        check = check or self._lease.check_in_time
        waiting = self._waiting()
        for step, directory in waiting:
            check()
            if self._lease.stop is not None and step != waiting[-1][0]:
                continue
            try:
                sealed_directory.verify(directory)
                self._store(step, directory, check)
            except (CheckpointDamaged, ObjectDamaged) as error:
                log.error("checkpoint_damaged", step=step, error=str(error))
                self._lease.warn(f"The checkpoint of step {step} was damaged and is not kept", {"step": step})
            self._seen.add(step)

    def _waiting(self) -> list[tuple[int, Path]]:
        """Those that are complete and were not taken up yet, oldest first."""
        return [(step, directory) for step, directory in self._run.complete_checkpoints() if step not in self._seen]

    def _store(self, step: int, directory: Path, check: Check) -> None:
        storage, key = self._resources.storage, f"checkpoints/{new_token()}.tar"  # also where a step is stored again: no key is written twice
        model = new_trained_model(self._prepared, step)
        keys, replaced = [key, model.storage_key], list[str]()
        try:
            state = store_directory(storage, key, directory, self._run.path, check)
            check_stored(storage, state, check)
            store_adapter(storage, model, directory, self._run.path, check)
            metrics = json.loads((directory / "metrics.json").read_text())

            def register(session: Session) -> None:
                replaced[:] = self._register(session, step, state, metrics, model)

            self._lease.write(register)
        finally:
            delete_unreferenced(self._resources.database, storage, [*keys, *replaced])
        checkpoints_stored.inc()
        log.info("checkpoint_stored", step=step, size_bytes=state.size_bytes)

    def _register(self, session: Session, step: int, state: StoredObject, metrics: dict[str, object], model: Model) -> list[str]:
        """Add the rows of a checkpoint. Returns the keys of the objects that nothing refers to any more."""
        assert_held(session, self._lease.claim)
        furthest = session.scalar(select(func.max(Model.step)).where(Model.job_id == self._job.id))  # their rows stay, whatever becomes of checkpoints
        if furthest is None or step > furthest:
            forgive_losses(session, self._lease.claim)
        existing = session.scalar(select(Checkpoint).where(Checkpoint.job_id == self._job.id, Checkpoint.step == step))
        if existing is not None:
            old_key = existing.storage_key
            existing.storage_key, existing.sha256, existing.metrics = state.key, state.sha256, metrics
            return [] if old_key is None else [old_key]
        if session.get(Model, model.id) is None:
            session.merge(model)  # a copy, because this may run again after the database was away
        session.add(
            Checkpoint(
                id=new_id("ftckpt"),
                job_id=self._job.id,
                step=step,
                created_at=unix_now(),
                storage_key=state.key,
                sha256=state.sha256,
                metrics=metrics,
                model_id=model.id,
            )
        )
        append_event(session, self._job.id, f"Checkpoint created at step {step}: {model.id}", data={"step": step, "model": model.id})
        return []
