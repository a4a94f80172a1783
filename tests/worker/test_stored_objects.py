"""A storage that does not keep what it is given: nothing that it damaged ever gets a row."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from core.storage import LocalStorage, ObjectDamaged, StoredObject
from core.tables.jobs import Checkpoint
from core.tables.models import Model
from tests.rows import assert_sound, get_job, messages_of
from tests.worker.conftest import Workshop
from tests.worker.test_supervisor import train_next
from worker.stored_objects import check_stored

Flip = Callable[[str], None]


@pytest.fixture
def flip(monkeypatch: pytest.MonkeyPatch) -> Flip:
    """From now on, one bit of every object whose key begins so is another one after it was written."""
    write_file = LocalStorage.write_file

    def begin(prefix: str) -> None:
        def write_and_flip(storage: LocalStorage, key: str, path: Path, check: Callable[[], None] = lambda: None) -> StoredObject:
            stored = write_file(storage, key, path, check)
            if key.startswith(prefix):
                content = bytearray(storage.path_of(key).read_bytes())
                content[len(content) // 2] ^= 1
                storage.path_of(key).write_bytes(content)
            return stored

        monkeypatch.setattr(LocalStorage, "write_file", write_and_flip)

    return begin


def rows_of(workshop: Workshop) -> tuple[list[int], list[int | None]]:
    """The steps of all checkpoints, and of all models (None: a final one)."""
    with workshop.database.reading() as session:
        return list(session.scalars(select(Checkpoint.step))), list(session.scalars(select(Model.step)))


def objects_under(workshop: Workshop, directory: str) -> list[Path]:
    return list((workshop.resources.settings.storage_dir / directory).rglob("*.tar*"))


def test_bytes_are_compared_with_what_was_written(tmp_path: Path, flip: Flip) -> None:
    storage = LocalStorage(tmp_path / "storage")
    (tmp_path / "object").write_bytes(b"content")
    check_stored(storage, storage.write_file("a", tmp_path / "object"))
    flip("b")
    with pytest.raises(ObjectDamaged, match="b: storage returned other bytes than were written"):
        check_stored(storage, storage.write_file("b", tmp_path / "object"))


def test_a_model_that_storage_damages_is_no_success_and_no_model(workshop: Workshop, flip: Flip) -> None:
    flip("models/")
    job_id = workshop.add_job()
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert job.error is not None
    assert (job.status, job.error["code"], job.fine_tuned_model) == ("failed", "storage_damaged", None)
    assert "storage returned other bytes than were written" in job.error["message"]
    assert rows_of(workshop) == ([], [])
    assert objects_under(workshop, "models") == []
    assert_sound(workshop.database, job_id)


def test_a_checkpoint_that_storage_damages_is_not_kept_and_the_job_goes_on(workshop: Workshop, flip: Flip) -> None:
    flip("checkpoints/")
    job_id = workshop.add_job()
    train_next(workshop)
    assert get_job(workshop.database, job_id).status == "succeeded"
    assert rows_of(workshop) == ([], [None])
    assert objects_under(workshop, "checkpoints") == []
    said = [message for message in messages_of(workshop.database, job_id) if message.endswith("was damaged and is not kept")]
    assert said == [f"The checkpoint of step {step} was damaged and is not kept" for step in (4, 8, 12)]
