"""The inference servers behind the gateway: replicas of one base model, each of which can answer for every adapter.

A request goes to the server with the fewest requests in flight; among equals the same model goes to the same server, which has
its adapter at hand. One that could not be reached, or answered that it is broken, is asked last, and looked after in the background
until it says that it is well: else one that fails at once would seem the least busy.
"""

import asyncio
import hashlib
import time

from core.inference_client import InferenceClient
from core.logging import get_logger
from core.settings import Settings

PROBE_EVERY_SECONDS = 2.0

log = get_logger(__name__)


class InferenceServers:
    """Safe for several threads; `in_order` is for one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.clients = [InferenceClient(url, settings) for url in settings.inference_urls]
        self._probes: dict[str, asyncio.Task[None]] = {}

    def healthy(self) -> bool:
        """Whether any answers; blocks."""
        return any(client.healthy() for client in sorted(self.clients, key=lambda client: client.is_down))

    def in_order(self, model: str) -> list[InferenceClient]:
        """All servers, the one to ask first at the front."""
        for client in self.clients:
            if client.is_down and client.url not in self._probes:
                self._probes[client.url] = asyncio.create_task(self._wait_until_up(client))
        return sorted(self.clients, key=lambda client: (client.is_down, client.in_flight, _rank(model, client.url)))

    async def _wait_until_up(self, client: InferenceClient) -> None:
        log.warning("inference_server_down", url=client.url)
        try:
            started = time.monotonic()
            while not await client.answers():
                await asyncio.sleep(PROBE_EVERY_SECONDS)
            log.info("inference_server_up", url=client.url, down_seconds=round(time.monotonic() - started, 1))
        finally:
            del self._probes[client.url]

    async def aclose(self) -> None:
        for probe in list(self._probes.values()):
            probe.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        for client in self.clients:
            await client.aclose()


def _rank(model: str, url: str) -> bytes:
    """Rendezvous hashing: each model has its own order of servers, and one server's absence moves only its own models."""
    return hashlib.sha256(f"{model}@{url}".encode()).digest()
