"""Deployments on both databases. After every test the invariants are checked, then everything is stopped and nothing may be left."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.settings import Settings
from local_stack.ports import free_local_port
from tests.faults.deployment import BASE, Deployment

LEASE_SECONDS = 6.0

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
"""Claims and leases are tried on both databases. For other faults one of both will do: CI has little time."""


@pytest.fixture
def make_deployment(tiny_model_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Deployment]]:
    """Deployments whose processes are not started yet, with a migrated database and a first key."""
    made: list[Deployment] = []

    def make(database_url: str | None = None, **variables: str) -> Deployment:
        number = len(made)
        inference_url = f"http://127.0.0.1:{free_local_port()}"
        environment = {
            "SDFT_DATA_DIR": str(tmp_path / f"data{number}"),
            "SDFT_CACHE_DIR": str(tmp_path / "cache"),
            "SDFT_BASE_MODELS": json.dumps([{"id": BASE, "source": str(tiny_model_dir)}]),
            "SDFT_INFERENCE_URLS": inference_url,
            "SDFT_PORT": str(free_local_port()),
            "SDFT_DEVICE": "cpu",
            "SDFT_DTYPE": "float32",
            "SDFT_LEASE_SECONDS": str(LEASE_SECONDS),
            "SDFT_HEARTBEAT_SECONDS": "0.5",
            "SDFT_POLL_SECONDS": "0.3",
            "SDFT_RETENTION_PROBES": "off",
            "SDFT_TRAINER_THREADS": "1",
            "SDFT_INFERENCE_THREADS": "1",
            **({"SDFT_DATABASE_URL": database_url} if database_url else {}),
            **variables,
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            settings = Settings()
        prepared = settings.base_models[0].directory(settings.cache_dir)
        if not prepared.exists():
            prepared.parent.mkdir(parents=True, exist_ok=True)
            prepared.symlink_to(tiny_model_dir)
        settings.data_dir.mkdir(mode=0o700, parents=True)
        deployment = Deployment(settings, environment)
        for module in ("migrations", "core.bootstrap"):
            subprocess.run([sys.executable, "-m", module], env=deployment.stack.environment | environment, check=True, capture_output=True)
        made.append(deployment)
        return deployment

    yield make
    try:
        for deployment in made:
            deployment.assert_sound()
    finally:
        for deployment in made:
            deployment.stop()
            left = deployment.processes()
            for process in left:
                process.kill()
            assert left == [], "processes outlived their deployment"


@pytest.fixture
def deployment(database_url: str, make_deployment: Callable[..., Deployment]) -> Deployment:
    """Everything is up, on SQLite and on Postgres where the test does not say on which."""
    found = make_deployment(database_url)
    found.start("valkey", "inference", "api", "worker")
    return found
