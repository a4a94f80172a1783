"""Merged and GGUF forms of models: made in a subprocess of the engine's when the API asked for one, and stored.

A thread of the worker's looks for them every second. The lease is renewed by a thread of its own, because reading a large model
back from storage takes longer than a lease may be.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.orm import Session

from core.archives import fetch_directory, store_directory
from core.base_models import BaseModelEntry
from core.durable_files import is_disk_full
from core.errors import ServiceError, StorageFull
from core.ids import model_file_name
from core.logging import get_logger
from core.model_exports import (
    IMPOSSIBLE,
    ExportClaim,
    ExportLost,
    claim_export,
    export_is_waiting,
    fail_export,
    finish_export,
    held_exports,
    release_export,
    renew_export,
)
from core.storage import ObjectDamaged, StoredObject
from core.tables.models import Model
from sdft_engine.contract.errors import BaseModelError, ConfigurationError, DiskFull
from worker.base_models import load_base_model
from worker.engine_process import run_to_end
from worker.resources import Resources
from worker.stored_objects import check_stored, delete_unreferenced

EXPORT_COMMAND = (sys.executable, "-m", "sdft_engine.weights_export")
LOOK_SECONDS = 1.0

log = get_logger(__name__)


class NotMade(Exception):
    """Carries code and message for whoever asked."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stopping(Exception):
    """This worker ends."""


class Exporter:
    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def run(self) -> None:
        """The thread's loop, until the process ends."""
        while not self._resources.stopping.wait(LOOK_SECONDS):
            try:
                while not self._resources.stopping.is_set() and self.make_one():
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
        with database.transaction() as session:
            claim = claim_export(session, settings.lease_seconds)
        if claim is not None:
            self._make(claim)
        return claim is not None

    def _make(self, claim: ExportClaim) -> None:
        log.info("export_started", model=claim.model_id, format=claim.format, attempt=claim.attempt)
        key = f"models/exports/{claim.lease_token}.{claim.format}.tar.gz"
        try:
            with self._held(claim) as check, self._scratch(claim) as scratch_dir:
                stored = self._stored(claim, key, scratch_dir, check)
                check()
            self._settle(claim, lambda session: finish_export(session, claim, stored))
            log.info("export_ready", model=claim.model_id, format=claim.format, size_bytes=stored.size_bytes)
        except ExportLost:
            log.warning("export_lost", model=claim.model_id, format=claim.format)
        except Stopping:
            self._settle(claim, lambda session: release_export(session, claim))
        except NotMade as error:
            log.error("export_failed", model=claim.model_id, format=claim.format, code=error.code, error=str(error))
            code, message = error.code, str(error)
            self._settle(claim, lambda session: fail_export(session, claim, code, message))
        except ServiceError:  # the database is away: the lease runs out, and the export is taken up again
            raise
        except Exception as error:  # a boundary: whoever asked is told, and not only this worker's log
            log.exception("export_failed_unexpectedly", model=claim.model_id, format=claim.format)
            code = DiskFull.code if is_disk_full(error) else "export_failed"
            message = "the worker's disk is full" if is_disk_full(error) else f"the worker failed with {type(error).__name__}; see its log"
            self._settle(claim, lambda session: fail_export(session, claim, code, message))
        finally:
            delete_unreferenced(self._resources.database, self._resources.storage, [key])

    def _settle(self, claim: ExportClaim, change: Callable[[Session], None]) -> None:
        try:
            with self._resources.database.transaction() as session:
                change(session)
        except ExportLost:
            log.warning("export_lost", model=claim.model_id, format=claim.format)

    def _stored(self, claim: ExportClaim, key: str, scratch_dir: Path, check: Callable[[], None]) -> StoredObject:
        """Raises NotMade, ExportLost or Stopping."""
        resources, settings = self._resources, self._resources.settings
        with resources.database.reading() as session:
            model = session.get_one(Model, claim.model_id)
        if model.status == "deleted":
            raise ExportLost(f"{model.id} was deleted")
        try:
            adapter_dir = fetch_directory(resources.storage, model.storage_key, model.archive_sha256, scratch_dir / "adapter")
        except FileNotFoundError as error:
            raise NotMade("export_failed", f"the adapter of {model.id} is no longer in storage") from error
        except ObjectDamaged as error:
            raise NotMade("export_failed", str(error)) from error
        try:
            base = load_base_model(settings, model.base_model, check).entry
            weights_dir = self._written(model, base, adapter_dir, scratch_dir / "weights", claim.format, check)
            stored = store_directory(resources.storage, key, weights_dir, scratch_dir, compress_level=0)
            check_stored(resources.storage, stored)
        except BaseModelError as error:
            raise NotMade(error.code, error.message) from error
        except ObjectDamaged as error:
            raise NotMade("export_failed", str(error)) from error
        except StorageFull as error:
            raise NotMade(DiskFull.code, error.message) from error
        return stored

    def _written(self, model: Model, base: BaseModelEntry, adapter_dir: Path, out_dir: Path, form: str, check: Callable[[], None]) -> Path:
        words = ["--format", form, "--base", str(base.directory(self._resources.settings.cache_dir)), "--adapter", str(adapter_dir)]
        words += ["--out", str(out_dir), "--name", model_file_name(model.id), "--parent", str(os.getpid())]
        ended = run_to_end([*EXPORT_COMMAND, *words], self._resources.settings, check)
        if ended.status == 0:
            return out_dir
        code, message = _said(ended.output)
        if code == ConfigurationError.code:
            raise NotMade(IMPOSSIBLE, message)
        if code is not None:
            raise NotMade(code, message)
        log.error("export_process_failed", model=model.id, exit_status=ended.status, output=ended.output[-4000:])
        raise NotMade("export_failed", f"the process that writes it ended with status {ended.status}")

    @contextmanager
    def _held(self, claim: ExportClaim) -> Iterator[Callable[[], None]]:
        """Renews the lease in the background. Yields what raises ExportLost or Stopping."""
        lost, done = threading.Event(), threading.Event()
        settings = self._resources.settings

        def renew() -> None:
            while not done.wait(settings.heartbeat_seconds):
                try:
                    with self._resources.database.transaction() as session:
                        renew_export(session, claim, settings.lease_seconds)
                except ExportLost:
                    lost.set()
                    return
                except ServiceError as error:
                    log.warning("database_unreachable", error=error.message)

        def check() -> None:
            if lost.is_set():
                raise ExportLost(claim.model_id)
            if self._resources.stopping.is_set():
                raise Stopping

        renewing = threading.Thread(target=renew, name="export-lease", daemon=True)
        renewing.start()
        try:
            yield check
        finally:
            done.set()
            renewing.join()

    @contextmanager
    def _scratch(self, claim: ExportClaim) -> Iterator[Path]:
        """A directory for this attempt. What attempts left behind that were killed with their worker goes; other workers may be at
        work beside it."""
        root = self._resources.settings.exports_dir
        root.mkdir(parents=True, exist_ok=True)
        there = list(root.iterdir())  # before the question whose they are: a claim is older than its directory
        with self._resources.database.reading() as session:
            held = held_exports(session)
        for leftover in there:
            if leftover.name not in held:
                shutil.rmtree(leftover, ignore_errors=True)
        directory = root / claim.lease_token
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _said(output: str) -> tuple[str | None, str]:
    """Code and message of the engine's last line."""
    try:
        error = json.loads(output.splitlines()[-1])
        return str(error["code"]), str(error["message"])
    except (IndexError, ValueError, KeyError, TypeError):
        return None, ""
