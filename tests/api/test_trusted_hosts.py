from collections.abc import Callable

import pytest

from core.settings import Settings
from tests.api.conftest import SETTINGS
from tests.api.serving import Api, serve
from tests.api.test_errors import assert_error

MakeSettings = Callable[..., Settings]


def test_only_the_listed_names_are_answered(make_settings: MakeSettings, sqlite_url: str, valkey: str) -> None:
    hosts = ["models.example.com", "*.example.net", "[2001:db8::1]"]
    with serve(make_settings(redis_url=valkey, inference_urls=["http://127.0.0.1:1"], allowed_hosts=hosts, **SETTINGS)) as api:
        for host in ("models.example.com", "MODELS.example.com:443", "a.example.net", "[2001:db8::1]:8000", "127.0.0.1:8000", "localhost", "[::1]:8000"):
            assert api.client.get("/v1/files", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:8000", "models.example.com.evil.example", "example.net", "user@localhost", "127.0.0.1.evil.example", ""):
            for path in ("/v1/files", "/healthz", "/metrics", "/v1/nothing"):
                assert "SDFT_ALLOWED_HOSTS" in assert_error(api.client.get(path, headers={"host": host}), 400, "invalid_host"), host


def test_a_wrong_host_is_refused_before_the_key_is_looked_at(make_settings: MakeSettings, sqlite_url: str, valkey: str) -> None:
    with serve(make_settings(redis_url=valkey, inference_urls=["http://127.0.0.1:1"], allowed_hosts=[], **SETTINGS)) as api:
        answer = api.client.post("/v1/files", headers={"host": "evil.example", "authorization": "Bearer wrong"})
        assert "'evil.example'" in assert_error(answer, 400, "invalid_host")
        assert_error(api.client.get("/v1/files", headers={"host": "localhost", "authorization": "Bearer wrong"}), 401, "invalid_api_key")


@pytest.mark.parametrize("host", ["evil.example", "192.0.2.1:8000"])
def test_every_name_is_answered_until_the_operator_lists_some(api: Api, host: str) -> None:
    assert api.client.get("/v1/files", headers={"host": host}).status_code == 200
