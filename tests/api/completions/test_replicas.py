"""Several inference servers behind the gateway: any of them answers for any model, and one that is away is not missed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from starlette.responses import JSONResponse

from core.settings import Settings
from core.tables.models import Model
from tests.api.conftest import SETTINGS
from tests.api.inference_stub import InferenceStub
from tests.api.model_rows import add_model
from tests.api.serving import Api, on_a_port, serve, wait_for
from tests.api.test_errors import assert_error

PUBLIC = "ft:tiny:default:lamps:1"
CHAT = "/v1/chat/completions"
AWAY = "http://127.0.0.1:1"
MakeApi = Callable[..., Api]


@pytest.fixture
def stubs() -> list[InferenceStub]:
    return [InferenceStub(), InferenceStub()]


@pytest.fixture
def make_api(make_settings: Callable[..., Settings], sqlite_url: str, valkey: str) -> Iterator[MakeApi]:
    """The API on a port, in front of stubs on ports of their own and of URLs."""
    with ExitStack() as opened:

        def make(*servers: InferenceStub | str) -> Api:
            urls = [server if isinstance(server, str) else opened.enter_context(on_a_port(server.application())) for server in servers]
            api = opened.enter_context(serve(make_settings(redis_url=valkey, inference_urls=urls, **SETTINGS)))
            return replace(api, base_url=opened.enter_context(on_a_port(api.app)))

        yield make


def body(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


def ask(api: Api, model: str = PUBLIC, **fields: Any) -> httpx2.Response:
    return httpx2.post(api.base_url + CHAT, json=body(model, **fields), headers=api.headers, timeout=20)


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_is_away_is_not_missed(make_api: MakeApi, stubs: list[InferenceStub], stream: bool) -> None:
    api = make_api(AWAY, stubs[0], "http://127.0.0.1:2")
    for number in range(4):
        add_model(api, f"ft:tiny:default:m:{number}")
        assert ask(api, f"ft:tiny:default:m:{number}", stream=stream).status_code == 200
    assert api.client.get("/readyz").json()["checks"]["inference"] == "ok"


def test_all_away_is_unavailable(make_api: MakeApi) -> None:
    api = make_api(AWAY, "http://127.0.0.1:2")
    assert_error(ask(api, "tiny"), 503, "inference_unavailable")
    assert "inference" in api.client.get("/readyz").json()["degraded"]


def test_a_model_stays_with_the_server_that_has_its_adapter(make_api: MakeApi, stubs: list[InferenceStub]) -> None:
    api = make_api(*stubs)
    models: list[Model] = [add_model(api, f"ft:tiny:default:m:{number}") for number in range(24)]
    for _ in range(3):
        for model in models:
            assert ask(api, model.id).status_code == 200
    assert [len(stub.load_paths) for stub in stubs] == [2 * len(stub.loaded) for stub in stubs]
    assert all(stub.loaded for stub in stubs), "twenty-four models go to both servers, but for once in eight million times"
    assert sum(len(stub.loaded) for stub in stubs) == len(models)


def test_a_busy_server_hands_its_models_on(make_api: MakeApi, stubs: list[InferenceStub]) -> None:
    api = make_api(*stubs)
    add_model(api, PUBLIC)
    assert ask(api).status_code == 200
    busy, idle = sorted(stubs, key=lambda stub: not stub.loaded)
    busy.endless = True
    with httpx2.stream("POST", api.base_url + CHAT, json=body(PUBLIC, stream=True), headers=api.headers, timeout=20) as streaming:
        assert streaming.status_code == 200
        assert ask(api).status_code == 200
    assert (len(busy.load_paths), len(idle.load_paths)) == (2, 2)


def test_a_server_that_serves_something_else_is_passed_over(make_api: MakeApi, stubs: list[InferenceStub]) -> None:
    api = make_api(*stubs)
    stubs[0].ignores_adapters = True
    for number in range(6):
        add_model(api, f"ft:tiny:default:m:{number}")
        assert ask(api, f"ft:tiny:default:m:{number}").status_code == 200
    assert stubs[0].answered == {}
    stubs[1].ignores_adapters = True
    stubs[1].loaded.clear()
    assert "not applied" in assert_error(ask(api, "ft:tiny:default:m:0"), 502, "inference_failed")


def test_a_server_that_comes_back_is_asked_again(make_api: MakeApi, stubs: list[InferenceStub]) -> None:
    api = make_api(*stubs)
    first, second = api.state.inference.clients
    second.is_down = True  # as it was found a moment ago
    assert ask(api, "tiny").status_code == 200
    assert stubs[1].answered == {}
    wait_for(lambda: not second.is_down)
    first.is_down = True
    assert ask(api, "tiny").status_code == 200
    assert stubs[1].answered == {"tiny": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_with_another_key_is_passed_over(make_api: MakeApi, stubs: list[InferenceStub], stream: bool) -> None:
    stubs[0].misbehaviour = lambda request: JSONResponse({"error": "Unauthorized"}, 401)
    api = make_api(*stubs)
    for number in range(24):
        add_model(api, f"ft:tiny:default:m:{number}")
        assert ask(api, f"ft:tiny:default:m:{number}", stream=stream).status_code == 200
    assert stubs[0].chats != []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_server_that_says_it_can_t_is_passed_over_and_asked_last(make_api: MakeApi, stubs: list[InferenceStub], status: int, stream: bool) -> None:
    """A proxy before a dead vLLM, or a vLLM whose engine died: it fails at once, and would seem the least busy of all."""
    stubs[0].misbehaviour = lambda request: JSONResponse({"error": {"message": "no engine"}}, status)
    stubs[0].healthy = False
    api = make_api(*stubs)
    for number in range(24):  # all to the other server once in seventeen million times
        add_model(api, f"ft:tiny:default:m:{number}")
        assert ask(api, f"ft:tiny:default:m:{number}", stream=stream).status_code == 200
    assert api.state.inference.clients[0].is_down
    assert len(stubs[0].chats) <= 1
    stubs[0].misbehaviour, stubs[0].healthy = None, True
    wait_for(lambda: not api.state.inference.clients[0].is_down)


def test_a_request_that_breaks_a_server_is_not_handed_to_the_next(make_api: MakeApi, stubs: list[InferenceStub]) -> None:
    for stub in stubs:
        stub.misbehaviour = lambda request: JSONResponse({"error": {"message": "as the test says"}}, 500)
    api = make_api(*stubs)
    assert_error(ask(api, "tiny"), 502, "inference_failed")
    assert sum(len(stub.chats) for stub in stubs) == 1


def test_a_server_that_can_t_load_at_the_moment_is_passed_over(make_api: MakeApi, stubs: list[InferenceStub]) -> None:
    stubs[0].refuses_loads, stubs[0].refusal_status = "starting", 503
    api = make_api(*stubs)
    for number in range(24):
        add_model(api, f"ft:tiny:default:m:{number}")
        assert ask(api, f"ft:tiny:default:m:{number}").status_code == 200
    assert stubs[0].answered == {}


def test_more_than_a_hundred_answers_at_a_time(make_api: MakeApi, stubs: list[InferenceStub]) -> None:
    """The server queues what is too much for it; nobody waits here for a connection."""
    stubs[0].endless = True
    api = make_api(stubs[0])
    with ExitStack() as streams:
        client = streams.enter_context(httpx2.Client(limits=httpx2.Limits(max_connections=None), timeout=30))
        for _ in range(120):
            answer = streams.enter_context(client.stream("POST", api.base_url + CHAT, json=body("tiny", stream=True), headers=api.headers))
            assert answer.status_code == 200
        assert stubs[0].running == 120
        assert not api.state.inference.clients[0].is_down
