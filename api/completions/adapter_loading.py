"""Has adapters loaded into the inference server when a chat needs one that is not there: after its restart, say."""

import asyncio
from pathlib import Path

import anyio.to_thread

from core.errors import InferenceFailed
from core.inference_client import AdapterRefused, InferenceClient
from core.logging import get_logger
from core.served_adapters import load_into_server
from core.storage import Storage
from core.tables.models import Model

log = get_logger(__name__)


class AdapterLoading:
    """One load at a time for each adapter; whoever asks meanwhile waits for that one."""

    def __init__(self, storage: Storage, served_adapters_dir: Path, client: InferenceClient) -> None:
        self._storage = storage
        self._served_adapters_dir = served_adapters_dir
        self._client = client
        self._running: dict[str, asyncio.Task[None]] = {}

    async def load(self, model: Model) -> None:
        """Raises InferenceUnavailable, InferenceFailed with the server's reason, or ObjectDamaged."""
        task = self._running.get(model.serving_name)
        if task is None:
            task = asyncio.create_task(self._load(model))
            self._running[model.serving_name] = task
            task.add_done_callback(lambda done: self._forget(model.serving_name, done))
        await asyncio.shield(task)  # a client that leaves must not stop the load that others wait for

    def _forget(self, serving_name: str, done: asyncio.Task[None]) -> None:
        del self._running[serving_name]
        if not done.cancelled():
            done.exception()  # seen here too, for the case that everybody who waited has left

    async def _load(self, model: Model) -> None:
        log.info("adapter_loading", model=model.id)
        try:
            await anyio.to_thread.run_sync(load_into_server, model, self._storage, self._served_adapters_dir, self._client)
        except AdapterRefused as error:
            log.error("adapter_refused", model=model.id, error=str(error))
            raise InferenceFailed(f"the inference server can't load the model {model.id}: {error}") from error
