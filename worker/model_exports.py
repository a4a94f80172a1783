"""Merged and GGUF formats of models: made in a subprocess of the engine's when the API asked for one, and stored.

A thread of the worker's looks for them every second. Everything that takes long with a large model asks the lease all the while
whether to go on, so that a worker that ends is not held up, and hands the export on.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from structlog.contextvars import bound_contextvars

from core.archives import fetch_directory, stream_directory
from core.base_models import BaseModelEntry
from core.durable_files import is_disk_full
from core.errors import ServiceError, StorageFull, StorageUnavailable, Unavailable
from core.ids import model_file_name
from core.jobs.leases import LeaseLost
from core.logging import get_logger
from core.model_exports import (
    IMPOSSIBLE,
    ExportClaim,
    ExportLost,
    claim_export,
    export_is_waiting,
    fail_export,
    finish_export,
    release_export,
    tokens_of_running_exports,
)
from core.storage import ObjectDamaged, StoredObject
from core.tables.models import Model
from sdft_engine.contract.errors import BaseModelError, ConfigurationError, DiskFull
from sdft_engine.contract.machine_clock import machine_seconds
from worker.base_models import load_base_model, require_base_of
from worker.engine_process import engine_environment, run_to_end
from worker.held_lease import ExportLease, StopRequested
from worker.interruptible import interruptible
from worker.resources import Resources
from worker.stored_objects import check_stored, delete_unreferenced

EXPORT_COMMAND = (sys.executable, "-m", "sdft_engine.weights_export")
LOOK_SECONDS = 1.0
AFTER_OUTAGE_SECONDS = 15.0

log = get_logger(__name__)


class NotMade(Exception):
    """Carries code and message for whoever asked."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Exporter:
    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def run(self) -> None:
        """The thread's loop, until the process ends."""
        while not self._resources.stopping.wait(LOOK_SECONDS):
            try:
                while self._resources.may_claim and self.make_one():
                    pass
            except ServiceError as error:
                log.warning("database_unreachable", error=error.message)
            except Exception:
                log.exception("export_failed_unexpectedly")

    def make_one(self) -> bool:
        """Make the export that waits longest. Returns False where none waits."""
        database, settings = self._resources.database, self._resources.settings
        with database.reading() as session:
            if not export_is_waiting(session):
                return False
        claimed_at = machine_seconds()
        with database.transaction() as session:
            claim = claim_export(session, settings.lease_seconds)
        if claim is not None:
            self._make(claim, claimed_at)
        return claim is not None

    def _make(self, claim: ExportClaim, claimed_at: float) -> None:
        """The boundary: nothing but a kill leaves the export held."""
        key = f"models/exports/{claim.lease_token}.{claim.format}.tar.gz"
        with bound_contextvars(model=claim.model_id, format=claim.format, attempt=claim.attempt):
            log.info("export_started")
            try:
                with ExportLease(self._resources, claim, claimed_at) as lease:
                    self._make_or_give_up(lease, key)
            except LeaseLost as lost:
                log.warning("export_lost", reason=str(lost))
                delete_unreferenced(self._resources.database, self._resources.storage, [key])

    def _make_or_give_up(self, lease: ExportLease, key: str) -> None:
        """Raises LeaseLost."""
        try:
            with self._scratch(lease.claim) as scratch_dir:
                stored = interruptible(lambda: self._build_or_delete(lease.claim, key, scratch_dir, lease.check_wanted), lease.check_wanted)
        except LeaseLost:
            raise
        except Exception as error:
            _give_up(lease, error)
            if isinstance(error, StorageUnavailable):  # no other export can be made meanwhile
                self._resources.stopping.wait(AFTER_OUTAGE_SECONDS)
            return
        lease.settle(lambda session: finish_export(session, lease.claim, stored))
        log.info("export_ready", size_bytes=stored.size_bytes)

    def _build_or_delete(self, claim: ExportClaim, key: str, scratch_dir: Path, check: Callable[[], None]) -> StoredObject:
        """`_build_and_store`, which leaves no object where it fails."""
        try:
            return self._build_and_store(claim, key, scratch_dir, check)
        except BaseException:
            delete_unreferenced(self._resources.database, self._resources.storage, [key])
            raise

    def _build_and_store(self, claim: ExportClaim, key: str, scratch_dir: Path, check: Callable[[], None]) -> StoredObject:
        """Raises NotMade, LeaseLost or StopRequested."""
        resources = self._resources
        with resources.database.reading() as session:
            model = session.get_one(Model, claim.model_id)
        if model.status == "deleted":
            raise ExportLost(f"{model.id} was deleted")
        try:
            adapter_dir = fetch_directory(resources.storage, model.storage_key, model.archive_sha256, scratch_dir / "adapter", check)
        except FileNotFoundError as error:
            raise NotMade("export_failed", f"the adapter of {model.id} is no longer in storage") from error
        except ObjectDamaged as error:
            raise NotMade("export_failed", str(error)) from error
        try:
            base = self._prepare_base_model(model, check)
            require_base_of(adapter_dir, base, model.id)
            weights_dir = self._write_weights(model, base, adapter_dir, scratch_dir / "weights", claim.format, check)
            stored = stream_directory(resources.storage, key, weights_dir, check)
            check_stored(resources.storage, stored, check)
        except BaseModelError as error:
            raise NotMade(error.code, error.message) from error
        except ObjectDamaged as error:
            raise NotMade("export_failed", str(error)) from error
        return stored

    def _prepare_base_model(self, model: Model, check: Callable[[], None]) -> BaseModelEntry:
        """Raises BaseModelError where the catalogue doesn't hold it or it can't be prepared."""
        settings = self._resources.settings
        entry = settings.base_model(model.base_model)
        if entry is not None and entry.is_prepared(settings.cache_dir):  # nothing here needs its tokenizer
            return entry
        return load_base_model(settings, model.base_model, check).entry

    def _write_weights(self, model: Model, base: BaseModelEntry, adapter_dir: Path, out_dir: Path, format: str, check: Callable[[], None]) -> Path:
        words = ["--format", format, "--base", str(base.directory(self._resources.settings.cache_dir)), "--adapter", str(adapter_dir)]
        words += ["--out", str(out_dir), "--name", model_file_name(model.id), "--parent", str(os.getpid())]
        ended = run_to_end([*EXPORT_COMMAND, *words], engine_environment(self._resources.settings), check)
        if ended.status == 0:
            return out_dir
        code, message = _error_in_last_line(ended.output)
        if code == ConfigurationError.code:
            raise NotMade(IMPOSSIBLE, message)
        if code is not None:
            raise NotMade(code, message)
        log.error("export_process_failed", exit_status=ended.status, output=ended.output[-4000:])
        raise NotMade("export_failed", f"the process that writes it ended with status {ended.status}")

    @contextmanager
    def _scratch(self, claim: ExportClaim) -> Iterator[Path]:
        """A directory for this attempt. What attempts left behind that were killed with their worker goes; other workers may be at
        work beside it."""
        root = self._resources.settings.exports_dir
        root.mkdir(parents=True, exist_ok=True)
        there = list(root.iterdir())  # before the question whose they are: a claim is older than its directory
        with self._resources.database.reading() as session:
            in_use = tokens_of_running_exports(session)
        for leftover in there:
            if leftover.name not in in_use:
                shutil.rmtree(leftover, ignore_errors=True)
        directory = root / claim.lease_token
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _give_up(lease: ExportLease, error: Exception) -> None:
    """End the attempt for an exception: uncounted where it is no fault of the export's, else failed. Raises LeaseLost."""
    if isinstance(error, StopRequested | Unavailable):
        log.info("export_handed_back", reason=str(error))
        lease.settle(lambda session: release_export(session, lease.claim))
        return
    if isinstance(error, NotMade):
        code, message = error.code, str(error)
        log.error("export_failed", code=code, error=message)
    elif isinstance(error, StorageFull) or is_disk_full(error):
        code, message = DiskFull.code, error.message if isinstance(error, StorageFull) else "the worker's disk is full"
        log.error("export_failed", code=code, error=str(error))
    else:  # whoever asked is told, and not only this worker's log
        log.error("export_failed_unexpectedly", exc_info=error)
        code, message = "export_failed", f"the worker failed with {type(error).__name__}; see its log"
    lease.settle(lambda session: fail_export(session, lease.claim, code, message))


def _error_in_last_line(output: str) -> tuple[str | None, str]:
    """Code and message of what the engine says last, where that is an error of its own."""
    try:
        error = json.loads(output.splitlines()[-1])
        return str(error["code"]), str(error["message"])
    except (IndexError, ValueError, KeyError, TypeError):
        return None, ""
