from collections.abc import Iterator

from tests.api.serving import Api
from tests.api.test_errors import assert_error

JOBS = "/v1/fine_tuning/jobs"
LIMIT = 100_000
JSON = {"content-type": "application/json"}


def test_declared_body_that_is_too_large(api: Api) -> None:
    assert "100,000" in assert_error(api.client.post(JOBS, content=b" " * (LIMIT + 1), headers=JSON), 413, "request_too_large")


def test_streamed_body_that_becomes_too_large(api: Api) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    answer = api.client.post(JOBS, content=endless(), headers=JSON)
    assert "content-length" not in answer.request.headers
    assert_error(answer, 413, "request_too_large")


def test_body_at_the_limit_is_read(api: Api) -> None:
    assert_error(api.client.post(JOBS, content=b"{}".ljust(LIMIT), headers=JSON), 400, "missing", "model")


def test_body_where_none_is_wanted_is_limited_too(api: Api) -> None:
    job = api.create_job()
    assert_error(api.client.post(f"{JOBS}/{job['id']}/cancel", content=b" " * (LIMIT + 1)), 413, "request_too_large")
    assert api.client.get(f"{JOBS}/{job['id']}").json()["status"] == "validating_files"


def test_upload_has_limits_of_its_own(api: Api) -> None:
    assert api.upload(b"x" * 5 * LIMIT, purpose="user_data")


def test_nul_in_an_address_is_refused(api: Api) -> None:
    for address in ("/v1/files/%00", "/v1/models/a%00b", "/v1/files?after=%00", f"{JOBS}?metadata[a]=%00", f"{JOBS}/x%00/events"):
        assert_error(api.client.get(address), 400, "invalid_url")
