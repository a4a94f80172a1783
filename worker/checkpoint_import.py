"""Complete checkpoints go to storage as they appear, so that any machine can resume, and become servable models.

A step has one row. Where a resumed attempt writes a step again (its stored checkpoint was damaged), the row points to
the new state; the checkpoint's model stays what it was: models are immutable.
"""

import json
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.archives import store_directory
from core.database import unix_now
from core.ids import checkpoint_model_id, new_id, new_token, tuned_model_id
from core.jobs.events import append_event
from core.jobs.transitions import assert_held
from core.logging import get_logger
from core.storage import ObjectDamaged, StoredObject
from core.tables.jobs import Checkpoint
from core.tables.models import Model
from sdft_engine.contract.run_directory import RunDirectory
from worker.adapter_archives import check_manifest, check_stored, delete_unreferenced, store_adapter
from worker.held_lease import HeldLease
from worker.resources import Resources
from worker.run_preparation import PreparedRun

log = get_logger(__name__)


class CheckpointImport:
    def __init__(self, resources: Resources, run: RunDirectory, lease: HeldLease, prepared: PreparedRun) -> None:
        self._resources = resources
        self._run = run
        self._lease = lease
        self._job = prepared.job
        self._model_id = tuned_model_id(prepared.job.base_model, prepared.project_name, prepared.job.suffix, prepared.job.id)
        self._seen: set[int] = set()

    def import_new(self) -> None:
        """Store every checkpoint that is complete and not stored yet. Raises LeaseLost, StorageFull."""
        for step, directory in self._run.complete_checkpoints():
            if step in self._seen:
                continue
            self._seen.add(step)
            self._lease.check()
            try:
                check_manifest(directory)
                self._store(step, directory)
            except ObjectDamaged as error:
                log.error("checkpoint_damaged", step=step, error=str(error))
                self._lease.write(lambda session, step=step: self._report_damage(session, step))  # type: ignore[misc]

    def _store(self, step: int, directory: Path) -> None:
        storage, key = self._resources.storage, f"checkpoints/{self._job.id}/{self._lease.claim.attempt}-{step}.tar"
        model = self._checkpoint_model(step)
        keys, replaced = [key, model.storage_key], list[str]()
        try:
            state = store_directory(storage, key, directory, self._run.path)
            check_stored(storage, state)
            adapter = store_adapter(storage, model.serving_name, directory, self._run.path)
            model.archive_bytes, model.archive_sha256 = adapter.size_bytes, adapter.sha256
            metrics = json.loads((directory / "metrics.json").read_text())

            def register(session: Session) -> None:
                replaced[:] = self._register(session, step, state, metrics, model)

            self._lease.write(register)
        finally:
            delete_unreferenced(self._resources.database, storage, [*keys, *replaced])
        log.info("checkpoint_stored", step=step, size_bytes=state.size_bytes)

    def _register(self, session: Session, step: int, state: StoredObject, metrics: dict[str, object], model: Model) -> list[str]:
        """Add the rows of a checkpoint. Returns the keys of the objects that nothing refers to any more."""
        assert_held(session, self._lease.claim)
        existing = session.scalar(select(Checkpoint).where(Checkpoint.job_id == self._job.id, Checkpoint.step == step))
        if existing is not None:
            old_key = existing.storage_key
            existing.storage_key, existing.sha256, existing.metrics = state.key, state.sha256, metrics
            return [old_key]
        if session.get(Model, model.id) is None:  # a fresh object each time: this may run again after the database was away
            session.add(Model(**{column.key: getattr(model, column.key) for column in Model.__table__.columns}))
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

    def _checkpoint_model(self, step: int) -> Model:
        serving_name = new_token()
        return Model(
            id=checkpoint_model_id(self._model_id, step),
            project_id=self._job.project_id,
            job_id=self._job.id,
            base_model=self._job.base_model,
            parent_model=self._job.parent_model,
            step=step,
            status="unverified",
            serving_name=serving_name,
            storage_key=f"models/{serving_name}.tar.gz",
            attestation=None,
            created_at=unix_now(),
        )

    def _report_damage(self, session: Session, step: int) -> None:
        assert_held(session, self._lease.claim)
        append_event(session, self._job.id, f"The checkpoint of step {step} was damaged and is not kept", level="warn", data={"step": step})
