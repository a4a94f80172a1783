"""Uploads onto a disk that is really full: a small one is mounted, which needs root."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.settings import Settings
from tests.api.conftest import SETTINGS
from tests.api.serving import Api, serve, training_lines
from tests.api.test_errors import assert_error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "data" / "storage"
    directory.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture
def api_on_small_disk(make_settings: Callable[..., Settings], sqlite_url: str, valkey: str, small_disk: Path) -> Iterator[Api]:
    with serve(make_settings(redis_url=valkey, inference_urls=["http://127.0.0.1:1"], min_free_bytes=0, **SETTINGS)) as opened:
        yield opened


def test_a_full_disk_is_a_507_and_everything_else_stays(api_on_small_disk: Api, small_disk: Path) -> None:
    api, content = api_on_small_disk, os.urandom(600_000)
    kept = api.upload(content, purpose="user_data")
    for _ in range(3):
        answer = api.client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("large.bin", os.urandom(2_000_000))})
        assert_error(answer, 507, "storage_full")
    assert list((small_disk / ".tmp").iterdir()) == []
    assert [file["id"] for file in api.client.get("/v1/files").json()["data"]] == [kept]
    assert api.client.get(f"/v1/files/{kept}/content").content == content
    small = api.upload(training_lines())
    assert api.client.delete(f"/v1/files/{kept}").status_code == 200
    assert api.upload(content, purpose="user_data")
    assert api.client.get(f"/v1/files/{small}/content").content == training_lines()
