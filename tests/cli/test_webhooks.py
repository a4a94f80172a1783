import json
from collections.abc import Callable

import pytest
from click.testing import Result

from tests.cli.stub_server import StubServer, json_answer, refusal

ENDPOINT = {
    "id": "whe_1",
    "object": "webhook_endpoint",
    "created_at": 1_700_000_000,
    "name": "my hook",
    "url": "https://hooks.example.com/\x1b[2J",
    "event_types": ["fine_tuning.job.failed"],
    "enabled": True,
    "disabled_reason": None,
}
TYPES = ["fine_tuning.job.succeeded", "fine_tuning.job.failed"]


def test_list(sdft: Callable[..., Result], stub: StubServer) -> None:
    off = ENDPOINT | {"id": "whe_2", "enabled": False, "disabled_reason": "the endpoint answered 410"}
    stub.routes["GET /webhook_endpoints"] = lambda _: json_answer({"object": "list", "data": [ENDPOINT, off], "has_more": False})
    shown = sdft("webhooks", "list").stdout
    for text in ("whe_1", "my hook", "https://hooks.example.com/", "fine_tuning.job.failed", "yes", "the endpoint answered 410"):
        assert text in shown
    assert "\x1b" not in shown
    assert json.loads(sdft("webhooks", "list", "--json").stdout) == [ENDPOINT, off]


def test_create_prints_the_secret(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["GET /webhook_event_types"] = lambda _: json_answer({"object": "list", "data": TYPES})
    stub.routes["POST /webhook_endpoints"] = lambda _: json_answer(ENDPOINT | {"signing_secret": "whsec_abc"})
    assert sdft("webhooks", "create", "https://hooks.example.com/").stdout == "whe_1\nwhsec_abc\n"
    assert stub.received[-1].json == {"name": "sdft", "url": "https://hooks.example.com/", "event_types": TYPES}
    sdft("webhooks", "create", "https://hooks.example.com/", "--name", "n", "--event", TYPES[0], "--event", TYPES[1])
    assert stub.received[-1].json == {"name": "n", "url": "https://hooks.example.com/", "event_types": TYPES}


def test_refused_url(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["POST /webhook_endpoints"] = lambda _: refusal(400, "url: the URL must begin with https://", "invalid_webhook_url")
    result = sdft("webhooks", "create", "http://x/", "--event", TYPES[0])
    assert (result.exit_code, result.stderr) == (1, "error: url: the URL must begin with https://\n")


def test_delete(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["DELETE /webhook_endpoints/whe_1"] = lambda _: json_answer({"id": "whe_1", "object": "webhook_endpoint.deleted", "deleted": True})
    assert sdft("webhooks", "delete", "whe_1").stdout == "deleted whe_1\n"


@pytest.mark.parametrize(("status", "exit_code"), [(204, 0), (500, 1)])
def test_test(sdft: Callable[..., Result], stub: StubServer, status: int, exit_code: int) -> None:
    stub.routes["POST /webhook_endpoints/whe_1/test"] = lambda _: json_answer({"status_code": status})
    result = sdft("webhooks", "test", "whe_1")
    assert (result.exit_code, result.stdout) == (exit_code, f"the endpoint answered {status}\n")
    assert stub.received[-1].json == {"event_type": "fine_tuning.job.succeeded"}
