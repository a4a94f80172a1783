"""python -m worker.await_base_models, as the init container of a worker that reads a cache which somebody else fills."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from core.base_models import PREPARED_MARK, BaseModelEntry
from core.settings import Settings
from tests.worker.test_supervisor import wait_for
from worker.await_base_models import await_base_models

ENTRIES = [BaseModelEntry(id=name, source=f"/{name}") for name in ("one", "two")]


@contextmanager
def waiting(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    catalogue = json.dumps([entry.model_dump() for entry in ENTRIES])
    environment = {"SDFT_DATA_DIR": str(tmp_path / "data"), "SDFT_CACHE_DIR": str(tmp_path / "cache"), "SDFT_BASE_MODELS": catalogue}
    with (tmp_path / "said").open("w") as said:
        command = [sys.executable, "-m", "worker.await_base_models"]
        process = subprocess.Popen(command, env=os.environ | environment, stdout=said, stderr=subprocess.STDOUT, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def prepare(entry: BaseModelEntry, cache_dir: Path) -> None:
    directory = entry.directory(cache_dir)
    directory.mkdir(parents=True)
    (directory / PREPARED_MARK).write_text("{}")


def test_it_ends_once_all_are_there_and_says_for_which_it_waits(tmp_path: Path) -> None:
    prepare(ENTRIES[0], tmp_path / "cache")
    with waiting(tmp_path) as process:
        wait_for(lambda: "two" in (tmp_path / "said").read_text())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        prepare(ENTRIES[1], tmp_path / "cache")
        assert process.wait(60) == 0
    assert '"base_models": ["two"]' in (tmp_path / "said").read_text()


def test_it_ends_when_told(tmp_path: Path) -> None:
    with waiting(tmp_path) as process:
        wait_for(lambda: "two" in (tmp_path / "said").read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


def test_one_that_never_comes_keeps_no_worker_from_the_others(make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.await_base_models.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("worker.await_base_models.MOST_SECONDS", 0.1)
    with capture_logs() as logs:
        await_base_models(make_settings(base_models=ENTRIES))
    assert [entry["base_models"] for entry in logs if entry["event"] == "base_models_missing"] == [["one", "two"]]
