"""Other formats of a model's weights, for download: a worker makes them when they are first asked for."""

import asyncio
import time

from anyio import to_thread

from api.state import ApiState
from core.errors import ExportFailed, ExportInProgress, ExportNotPossible, ModelNotFound
from core.model_exports import IMPOSSIBLE, request_export
from core.storage import StoredObject
from core.tables.exports import ModelExport
from core.tables.models import Model

WAIT_SECONDS = 20.0
"""A request waits that long for an export that is being made. Longer, and proxies would cut it off."""
POLL_SECONDS = 0.5


async def stored_export(state: ApiState, model: Model, format: str) -> StoredObject:
    """The model in this format in storage; asked for, and waited for a moment, where it is not there yet. No session is held
    meanwhile.

    Raises ExportInProgress, ExportNotPossible where this model can't have the format, ExportFailed, or ModelNotFound where it was
    deleted meanwhile.
    """
    until = time.monotonic() + WAIT_SECONDS
    export = await to_thread.run_sync(_read_export, state, model, format)
    if export is None or export.status == "failed":
        export = await to_thread.run_sync(_ask_for_export, state, model, format)
    while (stored := _object_of(model, export)) is None:
        if time.monotonic() > until:
            raise ExportInProgress(f"{model.id} is being exported as {format}; ask again in a moment")
        await asyncio.sleep(POLL_SECONDS)
        export = await to_thread.run_sync(_read_export, state, model, format)
    return stored


def _ask_for_export(state: ApiState, model: Model, format: str) -> ModelExport:
    with state.database.transaction() as session:
        return request_export(session, model, format)


def _read_export(state: ApiState, model: Model, format: str) -> ModelExport | None:
    with state.database.reading() as session:
        return session.get(ModelExport, (model.id, format))


def _object_of(model: Model, export: ModelExport | None) -> StoredObject | None:
    """None while it is being made. Raises ModelNotFound where there is none: it goes with its model."""
    if export is None:
        raise ModelNotFound(f"The model {model.id!r} does not exist", param="model")
    if export.status == "failed":
        error = export.error or {}
        message = f"{export.model_id} can't be exported as {export.format}: {error.get('message')}"
        raise ExportNotPossible(message, param="format") if error.get("code") == IMPOSSIBLE else ExportFailed(message, code=error.get("code"))
    if export.storage_key is None or export.archive_bytes is None or export.archive_sha256 is None:
        return None
    return StoredObject(export.storage_key, export.archive_bytes, export.archive_sha256)
