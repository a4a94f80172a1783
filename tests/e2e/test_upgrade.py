"""A database and storage that an older version wrote: this one migrates them at its start, serves their models and goes on with their
jobs.

tests/fixtures/old_data/0002.tar.gz was written by `sdft up` with the schema's revision 0002 on the tiny model, and stopped with SIGTERM
in the middle of a job: `data/` (database.sqlite3, storage/, admin.key) and expected.json.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from local_stack.ports import free_local_port
from migrations.upgrade import current_revision
from tests.e2e.conftest import Service, running_service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OLD_DATA = Path(__file__).parents[1] / "fixtures" / "old_data" / "0002.tar.gz"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The old data directory, and what should be in it."""
    directory = tmp_path_factory.mktemp("old")
    with tarfile.open(OLD_DATA) as archive:
        archive.extractall(directory, filter="data")
    assert current_revision(f"sqlite:///{directory / 'data' / 'database.sqlite3'}") == "0002"
    return directory / "data", json.loads((directory / "expected.json").read_text())


@pytest.fixture(scope="module")
def service(old: tuple[Path, dict[str, Any]], tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = os.environ | {
        "SDFT_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "SDFT_BASE_MODELS": json.dumps([{"id": "tiny", "source": str(tiny_model_dir)}]),
        "SDFT_DEVICE": "cpu",
        "SDFT_DTYPE": "float32",
        "SDFT_RETENTION_PROBES": "off",
        "SDFT_POLL_SECONDS": "0.5",
    }
    with running_service(old[0], free_local_port(), environment) as running:
        yield running


def test_old_models_answer_and_are_downloaded(service: Service, old: tuple[Path, dict[str, Any]]) -> None:
    expected = old[1]
    answer = service.client.chat.completions.create(
        model=expected["model"], messages=[{"role": "user", "content": expected["question"]}], temperature=0, max_tokens=8
    )
    assert answer.choices[0].message.content == expected["answer"]
    archive: Any = service.client.get(f"/models/{expected['model']}/adapter", cast_to=bytes, options={"headers": {"accept": "*/*"}})
    assert len(archive) > 1000
    assert service.client.files.content(expected["file"]).read().count(b"\n") == 12


def test_old_jobs_go_on(service: Service, old: tuple[Path, dict[str, Any]]) -> None:
    jobs = old[1]["jobs"]
    assert service.client.fine_tuning.jobs.retrieve(jobs["done"]).status == "succeeded"
    interrupted = service.wait(jobs["interrupted"])
    assert (interrupted.status, interrupted.model_extra["attempt"]) == ("succeeded", 2), interrupted.error
    assert any("resumed at step" in event.message for event in service.events(interrupted.id))
    assert service.wait(jobs["waiting"]).status == "succeeded"
    new = service.client.fine_tuning.jobs.create(model=old[1]["model"], training_file=old[1]["file"], suffix="next")
    service.client.fine_tuning.jobs.cancel(new.id)
    assert service.wait(new.id).status == "cancelled"
