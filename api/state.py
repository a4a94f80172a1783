"""What a request may use: opened once a process, when the application starts."""

from dataclasses import dataclass
from typing import Annotated

from celery import Celery
from fastapi import Depends, Request

from api.completions.adapter_loading import AdapterLoading
from core.database import Database
from core.doorbell import celery_application
from core.inference_servers import InferenceServers
from core.object_storage import open_storage
from core.settings import Settings
from core.storage import Storage


@dataclass(frozen=True)
class ApiState:
    settings: Settings
    database: Database
    storage: Storage
    doorbell: Celery
    inference: InferenceServers
    adapter_loading: AdapterLoading

    @classmethod
    def open(cls, settings: Settings) -> "ApiState":
        storage = open_storage(settings)
        inference = InferenceServers(settings)
        return cls(
            settings=settings,
            database=Database(settings.resolved_database_url),
            storage=storage,
            doorbell=celery_application(settings),
            inference=inference,
            adapter_loading=AdapterLoading(storage, settings.served_adapters_dir, settings.attestation_tolerance),
        )

    async def aclose(self) -> None:
        await self.inference.aclose()
        self.doorbell.close()
        self.database.close()


async def _state_of(request: Request) -> ApiState:
    state: ApiState = request.app.state.api
    return state


async def _project_of(request: Request) -> str:
    """The caller's project, which the authentication left in the request's state."""
    project_id: str = request.state.project_id
    return project_id


State = Annotated[ApiState, Depends(_state_of)]
ProjectId = Annotated[str, Depends(_project_of)]
