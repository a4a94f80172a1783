import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from api import health, probes
from api.app import create_app
from core.database import Database
from core.schema_revision import SchemaDoesNotFit
from core.settings import Settings
from core.workers import tell_presence
from tests.api.inference_stub import InferenceStub
from tests.api.serving import Api, wait_for

MakeSettings = Callable[..., Settings]


def test_alive(api: Api) -> None:
    assert api.client.get("/healthz").json() == {"status": "ok"}


def presence(api: Api, devices: list[list[str]]) -> None:
    with api.database.transaction() as session:
        tell_presence(session, "worker", "host", devices)


def test_ready_with_everything(live_api: Api) -> None:
    presence(live_api, [[]])
    answer = live_api.client.get("/readyz")
    assert answer.status_code == 200
    checks = dict.fromkeys(("database", "schema", "broker", "inference", "workers", "storage"), "ok")
    assert answer.json() == {"status": "ok", "degraded": [], "checks": checks}


def test_degraded_where_the_inference_server_refuses_the_key(live_api: Api, inference: InferenceStub) -> None:
    presence(live_api, [[]])
    inference.refuses_key = True
    answer = live_api.client.get("/readyz")
    assert (answer.status_code, answer.json()["degraded"]) == (200, ["inference"])


def test_degraded_without_inference_server_and_workers(api_on_both: Api) -> None:
    answer = api_on_both.client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["status"] == "degraded"
    assert answer.json()["degraded"] == ["inference", "workers"]
    assert answer.json()["checks"]["workers"] == "none"
    presence(api_on_both, [])
    assert "workers" in api_on_both.client.get("/readyz").json()["degraded"], "one without slots trains nothing"
    presence(api_on_both, [["GPU-0"]])
    assert api_on_both.client.get("/readyz").json()["degraded"] == ["inference"]


def test_storage_that_is_full_is_named(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "storage_condition", lambda settings, storage: "full")
    answer = api.client.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]["storage"]) == (200, "full")
    assert "storage" in answer.json()["degraded"]


@pytest.mark.parametrize(("revision", "status", "check"), [("9999", 200, "newer"), ("0001", 503, "older")])
def test_a_schema_that_is_not_this_program_s(api_on_both: Api, revision: str, status: int, check: str) -> None:
    """During a deploy the processes that are about to be replaced go on answering."""
    with api_on_both.database.transaction() as session:
        session.execute(text(f"update alembic_version set version_num = '{revision}'"))
    answer = api_on_both.client.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]["schema"]) == (status, check)
    assert "schema" in answer.json()["degraded"]
    assert answer.json()["checks"]["workers"] == "unknown"


@pytest.mark.parametrize("revision", ["0001", "9999"])
def test_the_api_does_not_start_on_another_schema(make_settings: MakeSettings, database: Database, database_url: str, revision: str) -> None:
    with database.transaction() as session:
        session.execute(text(f"update alembic_version set version_num = '{revision}'"))
    with pytest.raises(SchemaDoesNotFit, match="python -m migrations"), TestClient(create_app(make_settings(database_url=database_url))):
        pass


def test_a_probe_that_hangs_is_not_waited_for(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(health, "broker_answers", lambda url: released.wait(20))
    started = time.monotonic()
    answer = api.client.get("/readyz")
    released.set()
    assert time.monotonic() - started < 5
    assert answer.json()["checks"]["broker"] == "unreachable"


def test_a_probe_that_hangs_holds_one_thread_however_many_ask(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    asked: list[str] = []

    def hanging(url: str) -> bool:
        asked.append(url)
        return released.wait(20)

    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(health, "broker_answers", hanging)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda number: api.client.get("/readyz"), range(30)))
    assert {answer.json()["checks"]["broker"] for answer in answers} == {"unreachable"}
    assert len(asked) == 1
    released.set()
    wait_for(lambda: api.client.get("/readyz").json()["checks"]["broker"] == "ok")


@pytest.mark.parametrize("path", ["/readyz", "/metrics"])
def test_database_that_is_down(make_settings: MakeSettings, path: str) -> None:
    settings = make_settings(database_url="postgresql://nobody@127.0.0.1:1/none", redis_url="redis://127.0.0.1:1/0", inference_urls=["http://127.0.0.1:1"])
    with TestClient(create_app(settings)) as client:
        answer = client.get(path)
        if path == "/metrics":
            assert answer.status_code == 200
            assert "sdft_jobs{" not in answer.text
            assert "sdft_http_requests_total" in answer.text
        else:
            assert answer.status_code == 503
            assert answer.json()["status"] == "unavailable"
            assert answer.json()["degraded"] == ["database", "broker", "inference"]
            assert answer.json()["checks"]["schema"] == "unknown"
            assert answer.headers["retry-after"] == "2"
        assert client.get("/healthz").status_code == 200
