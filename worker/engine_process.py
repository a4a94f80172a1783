"""What every process of the engine that this worker starts has in common."""

import os

from core.settings import Settings


def engine_environment(settings: Settings) -> dict[str, str]:
    """The worker's own environment, without what only the service may know."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SDFT_")}
    kept |= {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
    if settings.training_slots > 1:
        kept.setdefault("GOMP_SPINCOUNT", "0")  # trainers side by side: a thread that waits for work takes the other's core
    if settings.trainer_threads:
        kept["OMP_NUM_THREADS"] = str(settings.trainer_threads)
    return kept
