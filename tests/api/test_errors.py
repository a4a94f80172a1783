import json
from typing import Any

import pytest

from api.error_handlers import bad_request
from api.files import service as files
from core.errors import BadRequest
from sdft_engine.contract.hyperparameters import SdftHyperparameters
from tests.api.serving import Api

JOBS = "/v1/fine_tuning/jobs"


def assert_error(answer: Any, status: int, code: str | None, param: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"].startswith("req-")
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    message: str = error["message"]
    assert "Traceback" not in message
    return message


def test_unknown_route(api: Api) -> None:
    assert "GET /v1/nothing" in assert_error(api.client.get("/v1/nothing"), 404, "unknown_url")
    assert_error(api.client.get("/v1/files/"), 404, "unknown_url")


def test_wrong_method(api: Api) -> None:
    answer = api.client.put("/v1/files")
    assert_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{", "json_invalid", None),
        (b"", "missing", None),
        (b"\xff\xfe", "json_invalid", None),
        (b'{"model": "tiny", "training_file": NaN}', "json_invalid", None),
        (b'{"model": "tiny", "training_file": "\\ud800"}', "json_invalid", None),
        (b"[" * 50_000, "json_too_deep", None),
        (b"[" * 1_000 + b"]" * 1_000, "json_too_deep", None),
        (b"[" * 65 + b"]" * 65, "json_too_deep", None),
        (b"[" * 64 + b"]" * 64, "model_attributes_type", None),
        (b"[]", "model_attributes_type", None),
        (b"{}", "missing", "model"),
        (b'{"model": "tiny"}', "missing", "training_file"),
        (b'{"model": 3, "training_file": "x"}', "string_type", "model"),
        (b'{"model": "a\\u0000b", "training_file": "x"}', "invalid_text", "model"),
        (b'{"model": "tiny", "training_file": "x\\u0000"}', "invalid_text", "training_file"),
    ],
)
def test_wrong_body(api: Api, body: bytes, code: str, param: str | None) -> None:
    assert_error(api.client.post(JOBS, content=body, headers={"content-type": "application/json"}), 400, code, param)


def test_deep_values_are_refused_wherever_they_stand(api: Api) -> None:
    deep = "[" * 900 + "]" * 900
    for path, body in (
        (JOBS, f'{{"model": "tiny", "training_file": "x", "method": {{"type": {deep}}}}}'),
        ("/v1/chat/completions", f'{{"model": "tiny", "messages": [{{"role": "user", "content": "hi"}}], "tools": [{{"a": {deep}}}]}}'),
    ):
        answer = api.client.post(path, content=body, headers={"content-type": "application/json"})
        assert "64 levels" in assert_error(answer, 400, "json_too_deep")


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"x" * 20_000: "v"}},
        {"method": {"type": "x" * 20_000}},
        {"method": {"type": "sdft", "x" * 20_000: 1}},
        {"method": {"type": "sdft", "sdft": {"x" * 20_000: 1}}},
        {"method": {"type": "sdft", "sdft": {"sampler": "x" * 20_000}}},
        {"method": {"type": "sdft", "sdft": {"hyperparameters": {"x" * 20_000: 1}}}},
    ],
)
def test_errors_do_not_repeat_a_body_at_length(api: Api, fields: dict[str, Any]) -> None:
    answer = api.client.post(JOBS, json={"model": "tiny", "training_file": "x", **fields})
    assert answer.status_code == 400
    assert "x" * 40 in answer.json()["error"]["message"]
    assert len(answer.content) < 1_000


def test_an_unknown_cursor_is_not_repeated_at_length(api: Api) -> None:
    answer = api.client.get("/v1/files", params={"after": "x" * 10_000})
    assert len(assert_error(answer, 400, "invalid_cursor", "after")) < 300


def test_body_that_is_not_declared_as_json(api: Api) -> None:
    body = json.dumps({"model": "tiny", "training_file": "x"})
    answer = api.client.post(JOBS, content=body, headers={"content-type": "application/x-www-form-urlencoded"})
    assert "application/json" in assert_error(answer, 400, "invalid_content_type")


def test_description_of_the_api_can_be_had(api: Api) -> None:
    paths = api.client.get("/openapi.json").json()["paths"]
    assert {"/v1/files", "/v1/fine_tuning/jobs", "/v1/chat/completions"} <= paths.keys()


def test_wrong_query(api: Api) -> None:
    assert "limit" in assert_error(api.client.get("/v1/files", params={"limit": 0}), 400, "greater_than_equal", "limit")
    assert_error(api.client.get(JOBS, params={"limit": "x"}), 400, "int_parsing", "limit")
    assert_error(api.client.get("/v1/files", params={"order": "up"}), 400, "literal_error", "order")


def test_union_becomes_one_message_and_one_param() -> None:
    given = {"batch_size": 0}
    with pytest.raises(ValueError, match="batch_size") as caught:
        SdftHyperparameters.model_validate(given)
    error = bad_request(caught.value.errors(), given, prefix="method.sdft.hyperparameters")  # type: ignore[attr-defined]
    assert isinstance(error, BadRequest)
    assert error.param == "method.sdft.hyperparameters.batch_size"
    assert error.message == "method.sdft.hyperparameters.batch_size: input should be greater than or equal to 1 or input should be 'auto'"


def test_unexpected_error_is_logged_and_tells_nothing(api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("the secret path is /etc/secret")

    monkeypatch.setattr(files, "list_files", broken)
    answer = api.client.get("/v1/files")
    assert_error(answer, 500, "server_error")
    assert "secret" not in answer.text
    (line,) = [record.msg for record in caplog.records if record.levelname == "ERROR"]
    assert isinstance(line, dict)
    assert (line["event"], line["path"]) == ("unexpected_error", "/v1/files")
    assert line["request_id"] == answer.headers["x-request-id"]
    assert "/etc/secret" in line["exception"]


def test_exhausted_pool_is_503_and_recovers(api: Api) -> None:
    api.client.get("/v1/files")  # so that the key is known
    api.state.database.engine.pool._timeout = 0.2  # type: ignore[attr-defined]
    held = [api.state.database.engine.connect() for _ in range(40)]
    answer = api.client.get("/v1/files")
    assert_error(answer, 503, "service_unavailable")
    assert answer.headers["retry-after"] == "2"
    for connection in held:
        connection.close()
    assert api.client.get("/v1/files").status_code == 200


def test_every_request_has_its_own_id(api: Api) -> None:
    ids = {api.client.get(path).headers["x-request-id"] for path in ("/v1/files", "/v1/files", "/healthz", "/v1/nothing")}
    assert len(ids) == 4
