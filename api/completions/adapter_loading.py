"""Has adapters loaded into an inference server when a chat needs one that is not there: after its restart, say.

A server proves that it serves what was trained before it has the adapter under its serving name (core.served_adapters): it may be
another than the one that proved itself when the model was published, or have come back as another.
"""

import asyncio
import time
from pathlib import Path

import anyio
import anyio.to_thread

from core.errors import InferenceFailed
from core.inference_client import AdapterRefused, InferenceClient
from core.logging import get_logger
from core.served_adapters import load_proved
from core.storage import Storage
from core.tables.models import Model
from sdft_engine.contract.served_attestation import compare_served

LOADS_AT_A_TIME = 4
"""In threads of their own: those of the pool are every other request's."""
REFUSED_SECONDS = 30.0
"""For which a server that did not prove itself, or refused the adapter, is not asked again."""

log = get_logger(__name__)


class AdapterLoading:
    """One load at a time for each adapter and server; whoever asks meanwhile waits for that one. `tolerance` in nats."""

    def __init__(self, storage: Storage, served_adapters_dir: Path, tolerance: float) -> None:
        self._storage = storage
        self._served_adapters_dir = served_adapters_dir
        self._tolerance = tolerance
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._threads = anyio.CapacityLimiter(LOADS_AT_A_TIME)
        self._refused: dict[tuple[str, str], tuple[float, str]] = {}

    async def load(self, model: Model, client: InferenceClient) -> None:
        """Raises InferenceUnavailable, StorageUnavailable, StorageFull, ObjectDamaged, or InferenceFailed with the reason, which may be some
        seconds old."""
        key = (client.url, model.serving_name)
        until, reason = self._refused.get(key, (0.0, ""))
        if time.monotonic() < until:
            raise InferenceFailed(reason)
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._load(model, client))
            self._running[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        await asyncio.shield(task)  # a client that leaves must not stop the load that others wait for

    def _forget(self, key: tuple[str, str], done: asyncio.Task[None]) -> None:
        del self._running[key]
        if not done.cancelled():
            done.exception()  # seen here too, for the case that everybody who waited has left

    async def _load(self, model: Model, client: InferenceClient) -> None:
        log.info("adapter_loading", model=model.id, server=client.url)
        arguments = (model, self._storage, self._served_adapters_dir, client, compare_served, self._tolerance)
        try:
            verdict = await anyio.to_thread.run_sync(load_proved, *arguments, limiter=self._threads)
        except AdapterRefused as error:
            log.error("adapter_refused", model=model.id, server=client.url, error=str(error))
            raise self._refuse((client.url, model.serving_name), f"the inference server can't load the model {model.id}: {error}") from error
        except FileNotFoundError as error:
            log.error("adapter_missing", model=model.id, storage_key=model.storage_key)
            raise InferenceFailed(f"the adapter of the model {model.id} is no longer in storage") from error
        if verdict.reason is not None:
            log.error("served_model_differs", model=model.id, server=client.url, reason=verdict.reason)
            message = f"the inference server does not serve {model.id} as it was trained: {verdict.reason}"
            raise self._refuse((client.url, model.serving_name), message)

    def _refuse(self, key: tuple[str, str], reason: str) -> InferenceFailed:
        """Remembered for some seconds: every try sends the adapter to the server anew."""
        now = time.monotonic()
        self._refused = {other: known for other, known in self._refused.items() if known[0] > now}
        self._refused[key] = (now + REFUSED_SECONDS, reason)
        return InferenceFailed(reason)
