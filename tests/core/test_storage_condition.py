import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from core.object_storage import open_storage
from core.settings import Settings
from core.storage import LocalStorage
from core.storage_condition import storage_condition

MakeSettings = Callable[..., Settings]


def condition(settings: Settings) -> str:
    return storage_condition(settings, LocalStorage(settings.storage_dir))


def test_room_is_room_for_the_largest_upload(make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert condition(make_settings()) == "ok", "also before the directory is made"
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert condition(make_settings(max_file_bytes=1000, min_free_bytes=0)) == "ok"
    assert condition(make_settings(max_file_bytes=1001, min_free_bytes=0)) == "full"


def test_room_is_beside_what_uploads_leave(make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert condition(make_settings(max_file_bytes=600, min_free_bytes=400)) == "ok"
    assert condition(make_settings(max_file_bytes=600, min_free_bytes=401)) == "full"


def test_a_directory_that_cannot_be_written(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.storage_dir.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != settings.storage_dir)  # root may write anywhere
    assert condition(settings) == "not_writable"


def test_a_bucket_that_cannot_be_reached(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(
        storage_url="s3://bucket", s3_endpoint_url="http://127.0.0.1:1", s3_region="eu-central-1", s3_access_key_id="a", s3_secret_access_key="b"
    )
    storage = open_storage(settings)
    monkeypatch.setattr(storage, "problem", lambda: "connection refused")  # after a minute of trying
    assert storage_condition(settings, storage) == "unreachable"
    monkeypatch.setattr(storage, "problem", lambda: None)
    assert storage_condition(settings, storage) == "ok"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert storage_condition(settings, storage) == "not_writable", "adapters are still unpacked in the data directory"
