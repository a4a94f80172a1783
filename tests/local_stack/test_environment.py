import pytest

from local_stack.environment import CLIENT_VARIABLES, load_settings, unknown_variables
from local_stack.errors import StackError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SDFT_HEARTBEAT_SECONDS", "60", "SDFT_HEARTBEAT_SECONDS must be less than SDFT_LEASE_SECONDS, or every lease is lost"),
        ("SDFT_ALLOWED_HOSTS", '["a b"]', "SDFT_ALLOWED_HOSTS: 'a b' is not a name like models.example.com"),
        ("SDFT_BASE_MODELS", '[{"id": "mine"}]', "SDFT_BASE_MODELS.0.source: Field required"),
        ("SDFT_BASE_MODELS", "not json", "SDFT_BASE_MODELS: it has to be JSON"),
        ("SDFT_PORT", "many", "SDFT_PORT: Input should be a valid integer"),
    ],
)
def test_a_wrong_setting_is_named_as_the_user_wrote_it(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StackError) as caught:
        load_settings(None, None, None)
    assert str(caught.value).startswith(message)


def test_every_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_PORT", "many")
    monkeypatch.setenv("SDFT_POLL_SECONDS", "0")
    with pytest.raises(StackError, match=r"SDFT_PORT: .*; SDFT_POLL_SECONDS: "):
        load_settings(None, None, None)


def test_unknown_variables_are_found_with_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SDFT_DEVICE", "sdft_port", *CLIENT_VARIABLES):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == {}
    for name in ("SDFT_DEVIC", "SDFT_HEARTBEAT_SECOND", "SDFT_XYZZY"):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == {"SDFT_DEVIC": "SDFT_DEVICE", "SDFT_HEARTBEAT_SECOND": "SDFT_HEARTBEAT_SECONDS", "SDFT_XYZZY": None}
