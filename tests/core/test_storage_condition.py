import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from core.settings import Settings
from core.storage_condition import storage_condition


def test_room_is_room_for_the_largest_upload(make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage_condition(make_settings()) == "ok", "also before the directory is made"
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert storage_condition(make_settings(max_file_bytes=1000)) == "ok"
    assert storage_condition(make_settings(max_file_bytes=1001)) == "full"


def test_a_directory_that_cannot_be_written(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.storage_dir.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != settings.storage_dir)  # root may write anywhere
    assert storage_condition(settings) == "not_writable"
