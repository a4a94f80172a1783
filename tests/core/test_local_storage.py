"""Files on this machine's disk: durable, inside their directory, and clear about a full disk."""

import errno
import io
import os
import time
from pathlib import Path
from typing import Any

import pytest

from core.errors import StorageFull, StorageUnavailable
from core.storage import CHUNK_BYTES, LocalStorage

CONTENT = os.urandom(2 * CHUNK_BYTES + 12_345)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def files_in(storage: LocalStorage) -> list[str]:
    return sorted(str(path.relative_to(storage.root)) for path in storage.root.rglob("*") if path.is_file())


def test_commit_is_durable(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new directory's name, the file before its rename, and its directory after it."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    writer = storage.open_writer("files/a")
    writer.write(b"x")
    writer.commit()
    assert [Path(step).parent.name if ".tmp" in step else Path(step).name for step in steps] == ["storage", ".tmp", "rename", "files"]


@pytest.mark.parametrize("key", ["link", "link/outside"])
def test_links_do_not_lead_out_of_the_storage_directory(storage: LocalStorage, source: Path, tmp_path: Path, key: str) -> None:
    (storage.root / "link").symlink_to(tmp_path)
    for action in (storage.open_writer, storage.read, storage.exists, storage.delete, lambda key: storage.write_file(key, source)):
        with pytest.raises(ValueError, match="leaves the storage directory"):
            action(key)
    assert not (tmp_path / "outside").exists()


def fill_disk(writer: Any) -> None:
    """From here on the writer's bytes meet the kernel's own "no space left"."""
    writer._file.close()
    writer._file = open("/dev/full", "wb")  # noqa: SIM115


@pytest.mark.parametrize("size", [10, CHUNK_BYTES], ids=["noticed at the commit", "noticed while writing"])
def test_full_disk_is_a_507_and_leaves_nothing(storage: LocalStorage, size: int) -> None:
    writer = storage.open_writer("a")
    fill_disk(writer)

    def write_and_commit() -> None:
        writer.write(b"x" * size)
        writer.commit()

    with pytest.raises(StorageFull) as caught:
        write_and_commit()
    assert caught.value.status == 507
    writer.abort()
    assert files_in(storage) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_copying_a_file_onto_a_full_disk_cleans_up(storage: LocalStorage, source: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageFull):
        storage.write_file("a", source)
    assert files_in(storage) == []


def test_other_disk_errors_are_not_called_a_full_disk(storage: LocalStorage, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_disk(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", break_disk)
    with pytest.raises(StorageUnavailable):
        storage.write_file("a", source)
    assert files_in(storage) == []


def test_a_disk_that_is_not_mounted_is_not_taken_for_an_empty_one(storage: LocalStorage, source: Path) -> None:
    storage.write_file("files/a", source)
    began = storage.open_writer("files/b")
    mounted = storage.root.rename(storage.root.with_name("mounted"))
    storage.root.mkdir()
    for action in (
        lambda: storage.read("files/a"),
        lambda: storage.delete("files/a"),
        lambda: storage.write_file("files/c", source),
        lambda: list(storage.list_objects("files")),
        lambda: storage.discard_abandoned_uploads(0),
        began.commit,
    ):
        with pytest.raises(StorageUnavailable):
            action()
    began.abort()
    storage.root.rmdir()
    mounted.rename(storage.root)
    assert b"".join(storage.read("files/a")) == CONTENT
    with pytest.raises(FileNotFoundError):
        storage.read("files/c")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_fails_while_it_is_read_is_away(storage: LocalStorage, source: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    storage.write_file("files/a", source)

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", lambda path, mode: Failing())
    with pytest.raises(StorageUnavailable):
        list(storage.read("files/a"))


def test_what_killed_writers_left_is_discarded_when_it_is_old(storage: LocalStorage) -> None:
    abandoned, under_way = storage.open_writer("a"), storage.open_writer("b")
    abandoned.write(b"half")
    under_way.write(b"half")
    os.utime(abandoned._temporary, (time.time() - 90, time.time() - 90))
    assert storage.discard_abandoned_uploads(older_than_seconds=60) == 1
    assert [path.name for path in storage.temporary_dir.iterdir()] == [under_way._temporary.name]


def test_temporary_files_are_not_listed_with_the_objects(storage: LocalStorage, source: Path) -> None:
    storage.open_writer("files/a").write(b"half")
    assert list(storage.list_objects("files")) == []
    storage.write_file("files/b", source)
    assert [listed.key for page in storage.list_objects("files") for listed in page] == ["files/b"]
