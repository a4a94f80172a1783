"""What one worker process has, made once and shared by its threads."""

import sys
import threading
from dataclasses import dataclass, field
from functools import lru_cache

from celery import Celery

from core.database import Database
from core.doorbell import Doorbell
from core.inference_servers import InferenceServers
from core.object_storage import open_storage
from core.settings import Settings, get_settings
from core.storage import Storage
from worker.devices import DeviceGroup, Slots, training_groups

TRAINER_COMMAND = (sys.executable, "-m", "sdft_engine.train")
"""Called with the run directory as its only argument."""

VALIDATION_SLOTS = 2
"""Jobs that one worker validates at a time, beside the training slots: validation never waits behind training."""


@dataclass
class Resources:
    settings: Settings
    database: Database
    storage: Storage
    inference: InferenceServers
    doorbell: Doorbell
    trainer_command: tuple[str, ...] = TRAINER_COMMAND
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the process was told to end: nothing new is claimed, what runs is handed back."""
    schema_fits: bool = True
    """False while the database's schema is not this program's: nothing new is claimed, what runs goes on (worker/presence.py)."""
    training_slots: Slots = field(init=False)
    validation_slots: Slots = field(init=False)

    def __post_init__(self) -> None:
        self.training_slots = Slots(training_groups(self.settings))
        self.validation_slots = Slots([DeviceGroup()] * VALIDATION_SLOTS)

    @property
    def may_claim(self) -> bool:
        return self.schema_fits and not self.stopping.is_set()


def threads_needed(settings: Settings) -> int:
    """Threads of the Celery pool: one for every job that is trained and one for every job that is validated at a time."""
    return len(training_groups(settings)) + VALIDATION_SLOTS


@lru_cache
def resources_of(app: Celery) -> Resources:
    """This process's resources. First called before the pool's threads run, so they all get the same."""
    settings = get_settings()
    return Resources(
        settings=settings,
        database=Database(settings.resolved_database_url, connections=settings.database_connections),
        storage=open_storage(settings),
        inference=InferenceServers(settings),
        doorbell=Doorbell(app),
        trainer_command=TRAINER_COMMAND,
    )
