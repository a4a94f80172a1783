import pytest

from cli.client import Client, segment
from cli.errors import CliError, ServerRefused, ServerUnreachable
from tests.cli.stub_server import KEY, Received, StubServer, json_answer, refusal, stream_answer


@pytest.fixture
def client(stub: StubServer) -> Client:
    return Client(stub.base_url, KEY)


def test_our_variables_win_over_openais(monkeypatch: pytest.MonkeyPatch, stub: StubServer) -> None:
    stub.routes["GET /models"] = lambda _: json_answer({"data": []})
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv("SDFT_BASE_URL", stub.base_url + "/")
    monkeypatch.setenv("SDFT_API_KEY", KEY)
    assert Client.from_environment().get("/models") == {"data": []}


def test_without_a_url_it_is_this_machine_and_without_a_key_it_says_where_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "SDFT_BASE_URL", "OPENAI_API_KEY", "SDFT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CliError, match=r"SDFT_API_KEY.*admin\.key"):
        Client.from_environment()
    monkeypatch.setenv("SDFT_API_KEY", KEY)
    assert Client.from_environment().base_url == "http://127.0.0.1:8000/v1"


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch, stub: StubServer) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    stub.routes["GET /models"] = lambda _: json_answer({"data": []})
    assert Client(stub.base_url, KEY).get("/models") == {"data": []}


def test_the_servers_message_is_the_error(client: Client, stub: StubServer) -> None:
    stub.routes["GET /files/file-1"] = lambda _: refusal(404, "No such file: file-1")
    with pytest.raises(ServerRefused, match=r"^No such file: file-1$") as caught:
        client.get("/files/file-1")
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("code", "hint"), [("unknown_url", r"; does the base URL end in /v1\?$"), ("model_not_found", "; see `sdft models list`$"), ("other", r"No such thing\.$")]
)
def test_the_errors_code_brings_a_hint(client: Client, stub: StubServer, code: str, hint: str) -> None:
    stub.routes["GET /models"] = lambda _: refusal(404, "No such thing.", code)
    with pytest.raises(ServerRefused, match=hint):
        client.get("/models")


def test_an_error_that_is_no_json_names_the_status(client: Client, stub: StubServer) -> None:
    stub.routes["GET /files"] = lambda _: (502, {"content-type": "text/html"}, b"<html>bad gateway</html>")
    with pytest.raises(ServerRefused, match="502"):
        client.get("/files")


def test_an_answer_that_is_no_json_object_is_an_error(client: Client, stub: StubServer) -> None:
    stub.routes["GET /files"] = lambda _: (200, {"content-type": "text/html"}, b"<html>hello</html>")
    with pytest.raises(CliError, match="no JSON object"):
        client.get("/files")


def test_a_server_that_is_not_there_is_named(stub: StubServer) -> None:
    stub.stop()
    with pytest.raises(ServerUnreachable, match=f"{stub.base_url}.*sdft up"):
        Client(stub.base_url, KEY).get("/files")


@pytest.mark.parametrize("base_url", ["localhost:8000", "ftp://127.0.0.1/v1", "http://[::1/v1", ""])
def test_a_base_url_that_cannot_be_used_is_an_error(base_url: str) -> None:
    with pytest.raises(CliError):
        Client(base_url, KEY).get("/files")


def test_pages_are_followed_up_to_the_limit(client: Client, stub: StubServer) -> None:
    items = [{"id": f"file-{number}"} for number in range(250)]

    def page(request: Received) -> tuple[int, dict[str, str], bytes]:
        start = next((place + 1 for place, item in enumerate(items) if item["id"] == request.query.get("after")), 0)
        end = start + int(request.query["limit"])
        return json_answer({"data": items[start:end], "has_more": end < len(items)})

    stub.routes["GET /files"] = page
    assert list(client.pages("/files", None)) == items
    assert list(client.pages("/files", 130)) == items[:130]
    assert [request.query["limit"] for request in stub.received[-2:]] == ["100", "30"]


def test_a_stream_ends_at_done(client: Client, stub: StubServer) -> None:
    stub.routes["POST /chat/completions"] = lambda _: stream_answer({"n": 1}, {"n": 2}, "[DONE]")
    assert list(client.stream_events("/chat/completions", {})) == [{"n": 1}, {"n": 2}]


def test_a_stream_that_breaks_off_is_no_complete_answer(client: Client, stub: StubServer) -> None:
    stub.routes["POST /chat/completions"] = lambda _: stream_answer({"n": 1})
    with pytest.raises(ServerUnreachable, match="before the answer was complete"):
        list(client.stream_events("/chat/completions", {}))


def test_an_error_in_a_stream_is_an_error(client: Client, stub: StubServer) -> None:
    stub.routes["POST /chat/completions"] = lambda _: stream_answer({"n": 1}, {"error": {"message": "the inference server died"}})
    with pytest.raises(ServerRefused, match="the inference server died"):
        list(client.stream_events("/chat/completions", {}))


def test_model_ids_are_one_path_segment(client: Client, stub: StubServer) -> None:
    model = "ft:org/name:project:my suffix:abc"
    stub.routes["GET /models/.*"] = lambda _: json_answer({"id": model})
    client.get(f"/models/{segment(model)}")
    assert stub.received[-1].path == "/models/ft%3Aorg%2Fname%3Aproject%3Amy%20suffix%3Aabc"
