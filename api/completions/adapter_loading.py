"""Has adapters loaded into an inference server when a chat needs one that is not there: after its restart, say.

A server that has just loaded one proves that it serves what was trained before it answers for it: it may be another than the one
that proved itself when the model was published, or have come back as another.
"""

import asyncio
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from core.errors import InferenceFailed, InferenceUnavailable
from core.inference_client import AdapterRefused, InferenceClient
from core.logging import get_logger
from core.served_adapters import load_into_server
from core.storage import Storage
from core.tables.models import Model
from sdft_engine.contract.served_attestation import compare_served

LOADS_AT_A_TIME = 4
"""In threads of their own: those of the pool are every other request's."""
REFUSED_SECONDS = 30.0
"""For which a server that did not prove itself is not asked again."""

log = get_logger(__name__)


class AdapterLoading:
    """One load at a time for each adapter and server; whoever asks meanwhile waits for that one. `tolerance` in nats."""

    def __init__(self, storage: Storage, served_adapters_dir: Path, tolerance: float) -> None:
        self._storage = storage
        self._served_adapters_dir = served_adapters_dir
        self._tolerance = tolerance
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._threads = anyio.CapacityLimiter(LOADS_AT_A_TIME)
        self._unproved: set[tuple[str, str]] = set()
        self._refused: dict[tuple[str, str], tuple[float, str]] = {}

    async def settled(self, model: Model, client: InferenceClient) -> None:
        """Where the server may have the adapter without having proved it, have that done first. Raises what `load` does, and
        InferenceFailed where it failed to prove itself a moment ago."""
        key = (client.url, model.serving_name)
        until, reason = self._refused.get(key, (0.0, ""))
        if time.monotonic() < until:
            raise InferenceFailed(reason)
        if key in self._running or key in self._unproved:
            await self.load(model, client)

    async def load(self, model: Model, client: InferenceClient) -> None:
        """Raises InferenceUnavailable, InferenceFailed with the reason, or ObjectDamaged."""
        key = (client.url, model.serving_name)
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
        key = (client.url, model.serving_name)
        self._unproved.add(key)
        try:
            reason = await anyio.to_thread.run_sync(self._loaded_and_compared, model, client, limiter=self._threads)
        except AdapterRefused as error:
            log.error("adapter_refused", model=model.id, server=client.url, error=str(error))
            raise InferenceFailed(f"the inference server can't load the model {model.id}: {error}") from error
        if reason is not None:
            log.error("served_model_differs", model=model.id, server=client.url, reason=reason)
            message = f"the inference server does not serve {model.id} as it was trained: {reason}"
            self._refused[key] = (time.monotonic() + REFUSED_SECONDS, message)
            raise InferenceFailed(message)
        self._unproved.discard(key)
        self._refused.pop(key, None)

    def _loaded_and_compared(self, model: Model, client: InferenceClient) -> str | None:
        """Returns why the server may not answer for the model; it is unloaded then."""
        load_into_server(model, self._storage, self._served_adapters_dir, client)
        directory, score = self._served_adapters_dir / model.serving_name, client.prompt_logprobs
        served_dtype = client.served_dtype(model.base_model)
        verdict = compare_served(directory, partial(score, model.serving_name), partial(score, model.base_model), served_dtype, self._tolerance)
        if verdict.reason is not None:
            with suppress(AdapterRefused, InferenceUnavailable):  # it stays marked as unproved
                client.unload_adapter(model.serving_name)
        return verdict.reason
