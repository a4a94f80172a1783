from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from core.settings import Settings
from tests.api.inference_stub import InferenceStub
from tests.api.serving import Api

MakeSettings = Callable[..., Settings]


def test_alive(api: Api) -> None:
    assert api.client.get("/healthz").json() == {"status": "ok"}


def test_ready_with_everything(live_api: Api) -> None:
    answer = live_api.client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "degraded": [], "checks": {"database": "ok", "broker": "ok", "inference": "ok"}}


def test_degraded_where_the_inference_server_refuses_the_key(live_api: Api, inference: InferenceStub) -> None:
    inference.refuses_key = True
    answer = live_api.client.get("/readyz")
    assert (answer.status_code, answer.json()["degraded"]) == (200, ["inference"])


def test_degraded_without_inference_server(api: Api) -> None:
    answer = api.client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["status"] == "degraded"
    assert answer.json()["degraded"] == ["inference"]


@pytest.mark.parametrize("path", ["/readyz", "/metrics"])
def test_database_that_is_down(make_settings: MakeSettings, path: str) -> None:
    settings = make_settings(database_url="postgresql://nobody@127.0.0.1:1/none", redis_url="redis://127.0.0.1:1/0", inference_urls=["http://127.0.0.1:1"])
    with TestClient(create_app(settings)) as client:
        answer = client.get(path)
        if path == "/metrics":
            assert answer.status_code == 200
            assert 'sdft_jobs{status="queued"}' not in answer.text
            assert "sdft_http_requests_total" in answer.text
        else:
            assert answer.status_code == 503
            assert answer.json()["status"] == "unavailable"
            assert answer.json()["degraded"] == ["database", "broker", "inference"]
            assert answer.headers["retry-after"] == "2"
        assert client.get("/healthz").status_code == 200


def test_metrics_count_requests_and_jobs(api_on_both: Api) -> None:
    api = api_on_both
    api.create_job()
    api.client.get("/v1/files/unknown")
    api.client.get("/v1/nowhere")
    lines = api.client.get("/metrics").text.splitlines()
    assert 'sdft_jobs{status="validating_files"} 1.0' in lines
    assert 'sdft_jobs{status="running"} 0.0' in lines
    assert any(line.startswith('sdft_http_requests_total{method="GET",route="/v1/files/{file_id}",status="404"}') for line in lines)
    assert any(line.startswith('sdft_http_requests_total{method="GET",route="unknown",status="404"}') for line in lines)
    assert any(line.startswith('sdft_http_request_seconds_count{method="POST",route="/v1/fine_tuning/jobs"}') for line in lines)
    assert not any("unknown_file" in line or "nowhere" in line for line in lines)
