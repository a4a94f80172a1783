from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from core.settings import Settings
from tests.api.inference_stub import InferenceStub
from tests.api.serving import Api, on_a_port, serve

MakeSettings = Callable[..., Settings]

SETTINGS: dict[str, Any] = {"base_models": [{"id": "tiny", "source": "/models/tiny"}], "max_request_bytes": 100_000, "log_level": "warning"}


@pytest.fixture
def api(make_settings: MakeSettings, sqlite_url: str, valkey: str) -> Iterator[Api]:
    """The API in this process, on SQLite, with nothing behind its inference URL."""
    with serve(make_settings(redis_url=valkey, inference_urls=["http://127.0.0.1:1"], **SETTINGS)) as opened:
        yield opened


@pytest.fixture
def api_on_both(make_settings: MakeSettings, database_url: str, valkey: str) -> Iterator[Api]:
    """Likewise, on SQLite and on Postgres: for queries."""
    with serve(make_settings(database_url=database_url, redis_url=valkey, inference_urls=["http://127.0.0.1:1"], **SETTINGS)) as opened:
        yield opened


@pytest.fixture
def inference() -> InferenceStub:
    return InferenceStub()


@pytest.fixture
def live_api(make_settings: MakeSettings, sqlite_url: str, valkey: str, inference: InferenceStub) -> Iterator[Api]:
    """The API on a port, and the inference stub behind it."""
    with (
        on_a_port(inference.application()) as inference_url,
        serve(make_settings(redis_url=valkey, inference_urls=[inference_url], **SETTINGS)) as opened,
        on_a_port(opened.app) as base_url,
    ):
        yield replace(opened, base_url=base_url)
