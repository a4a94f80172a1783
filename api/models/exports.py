"""Other forms of a model's weights, for download: a worker makes them when they are first asked for."""

import asyncio
import time

import anyio.to_thread

from api.state import ApiState
from core.errors import ExportFailed, ExportInProgress, ExportNotPossible
from core.model_exports import IMPOSSIBLE, request_export
from core.storage import StoredObject
from core.tables.exports import ModelExport
from core.tables.models import Model

WAIT_SECONDS = 20.0
"""A request waits that long for an export that is being made. Longer, and proxies would cut it off."""
POLL_SECONDS = 0.5


async def stored_export(state: ApiState, model: Model, form: str) -> StoredObject:
    """The form of the model in storage; asked for, and waited for a moment, where it is not there yet. No session is held meanwhile.

    Raises ExportInProgress, ExportNotPossible where this model can't have the form, or ExportFailed.
    """
    until = time.monotonic() + WAIT_SECONDS
    export = await anyio.to_thread.run_sync(_found, state, model, form)
    if export is None or export.status == "failed":
        export = await anyio.to_thread.run_sync(_requested, state, model, form)
    while (stored := _stored(export)) is None:
        if time.monotonic() > until:
            raise ExportInProgress(f"the {form} form of {model.id} is being made; ask again in a moment")
        await asyncio.sleep(POLL_SECONDS)
        export = await anyio.to_thread.run_sync(_found, state, model, form)
    return stored


def _requested(state: ApiState, model: Model, form: str) -> ModelExport:
    with state.database.transaction() as session:
        return request_export(session, model, form)


def _found(state: ApiState, model: Model, form: str) -> ModelExport | None:
    with state.database.reading() as session:
        return session.get(ModelExport, (model.id, form))


def _stored(export: ModelExport | None) -> StoredObject | None:
    """None while it is being made."""
    if export is None:
        raise ExportFailed("the model was deleted while its export was made")
    if export.status == "failed":
        error = export.error or {}
        message = f"{export.model_id} can't be exported as {export.format}: {error.get('message')}"
        raise ExportNotPossible(message, param="format") if error.get("code") == IMPOSSIBLE else ExportFailed(message, code=error.get("code"))
    if export.storage_key is None or export.archive_bytes is None or export.archive_sha256 is None:
        return None
    return StoredObject(export.storage_key, export.archive_bytes, export.archive_sha256)
