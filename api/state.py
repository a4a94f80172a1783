"""What a request may use: opened once a process, when the application starts."""

from dataclasses import dataclass
from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import Depends, Request

from api.caller import caller_of
from api.completions.adapter_loading import AdapterLoading
from api.fine_tuning.jobs.event_feed import EventFeed
from api.fine_tuning.jobs.queue_view import QueueView
from api.key_limits import HeldByKeys
from api.probes import Probes
from api.remembered import Remembered
from api.storage_threads import StorageThreads
from core.audit import Actor
from core.database import Database
from core.doorbell import Doorbell, celery_application
from core.inference_servers import InferenceServers
from core.object_storage import open_storage
from core.settings import Settings
from core.storage import Storage

WEBHOOK_TESTS_AT_A_TIME = 8
MODELS_DELETED_AT_A_TIME = 8
MEASUREMENTS_SECONDS = 1.0


@dataclass(frozen=True)
class ApiState:
    settings: Settings
    database: Database
    storage: Storage
    doorbell: Doorbell
    inference: InferenceServers
    adapter_loading: AdapterLoading
    queue: QueueView
    event_feed: EventFeed
    streams_of_keys: HeldByKeys
    answers_of_keys: HeldByKeys
    measurements: Remembered[bytes]
    """Of /metrics, which asks for no key."""
    webhook_tests: anyio.CapacityLimiter
    storage_threads: StorageThreads
    deletion_threads: StorageThreads
    """Of models, which wait for inference servers too."""
    probes: Probes

    @classmethod
    def open(cls, settings: Settings) -> "ApiState":
        storage = open_storage(settings)
        inference = InferenceServers(settings)
        database = Database(settings.resolved_database_url, connections=settings.database_connections)
        return cls(
            settings=settings,
            database=database,
            storage=storage,
            doorbell=Doorbell(celery_application(settings)),
            inference=inference,
            adapter_loading=AdapterLoading(storage, settings.served_adapters_dir, settings.attestation_tolerance),
            queue=QueueView(database, settings.project_max_running_jobs),
            event_feed=EventFeed(database),
            streams_of_keys=HeldByKeys(settings.key_max_event_streams, "event streams"),
            answers_of_keys=HeldByKeys(settings.key_max_answers, "answers"),
            measurements=Remembered(MEASUREMENTS_SECONDS),
            webhook_tests=anyio.CapacityLimiter(WEBHOOK_TESTS_AT_A_TIME),
            storage_threads=StorageThreads(),
            deletion_threads=StorageThreads(MODELS_DELETED_AT_A_TIME),
            probes=Probes(),
        )

    async def aclose(self) -> None:
        self.event_feed.close()
        await anyio.to_thread.run_sync(self.event_feed.join)
        await self.inference.aclose()
        self.doorbell.close()
        self.database.close()


async def _state_of(request: Request) -> ApiState:
    state: ApiState = request.app.state.api
    return state


async def _project_of(request: Request) -> str:
    caller = caller_of(request.scope)
    assert caller is not None, "a route without a key has no project"
    return caller.project_id


async def _key_of(request: Request) -> str:
    caller = caller_of(request.scope)
    assert caller is not None, "a route without a key"
    return caller.key_id


async def _actor_of(request: Request) -> Actor:
    caller = caller_of(request.scope)
    assert caller is not None, "a route without a key changes nothing"
    return Actor(caller.key_id, request.state.request_id)


State = Annotated[ApiState, Depends(_state_of)]
ProjectId = Annotated[str, Depends(_project_of)]
"""The caller's project."""
KeyId = Annotated[str, Depends(_key_of)]
"""The caller's key."""
RequestActor = Annotated[Actor, Depends(_actor_of)]
"""The caller, as the audit log names it."""
