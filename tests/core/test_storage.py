import errno
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest

from core.errors import StorageFull
from core.storage import CHUNK_BYTES, LocalStorage, LocalWriter, ObjectDamaged, fetch

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


def content_of(storage: LocalStorage, key: str, *interval: int) -> bytes:
    return b"".join(storage.read(key, *interval))


def test_object_appears_whole_and_only_at_the_commit(storage: LocalStorage) -> None:
    writer = storage.open_writer("files/a")
    for start in range(0, len(CONTENT), 100_000):
        writer.write(CONTENT[start : start + 100_000])
    assert not storage.exists("files/a")
    stored = writer.commit()
    assert (stored.key, stored.size_bytes, stored.sha256) == ("files/a", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert content_of(storage, "files/a") == CONTENT
    assert files_in(storage) == ["files/a"]


def test_commit_replaces_an_older_object(storage: LocalStorage, source: Path) -> None:
    storage.write_file("a", source)
    writer = storage.open_writer("a")
    writer.write(b"new")
    assert content_of(storage, "a") == CONTENT
    writer.commit()
    assert content_of(storage, "a") == b"new"


def test_commit_is_durable(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before its rename, and its directory after it."""
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
    assert [Path(step).parent.name if ".tmp" in step else Path(step).name for step in steps] == [".tmp", "rename", "files"]


def test_abort_leaves_nothing_and_may_be_repeated(storage: LocalStorage) -> None:
    writer = storage.open_writer("a")
    writer.write(CONTENT)
    writer.abort()
    writer.abort()
    assert files_in(storage) == []


def test_abort_after_the_commit_keeps_the_object(storage: LocalStorage) -> None:
    writer = storage.open_writer("a")
    writer.write(b"kept")
    writer.commit()
    writer.abort()
    assert content_of(storage, "a") == b"kept"


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, None), (5, None), (0, 1), (7, 7), (CHUNK_BYTES - 1, CHUNK_BYTES + 1), (0, len(CONTENT)), (len(CONTENT) - 1, None), (10, 10**9), (10**9, None)],
)
def test_ranges(storage: LocalStorage, source: Path, start: int, end: int | None) -> None:
    storage.write_file("a", source)
    assert b"".join(storage.read("a", start, end)) == CONTENT[start:end]


def test_reading_streams_in_bounded_chunks(storage: LocalStorage, source: Path) -> None:
    storage.write_file("a", source)
    assert max(len(chunk) for chunk in storage.read("a")) == CHUNK_BYTES


def test_missing_object_fails_before_the_first_byte(storage: LocalStorage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")
    assert not storage.exists("nothing")


def test_delete_is_idempotent(storage: LocalStorage, source: Path) -> None:
    storage.write_file("files/a", source)
    storage.delete("files/a")
    storage.delete("files/a")
    assert not storage.exists("files/a")


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../outside", "", ".", "link/outside"])
def test_keys_can_not_leave_the_storage_directory(storage: LocalStorage, source: Path, tmp_path: Path, key: str) -> None:
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
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        storage.write_file("a", source)
    assert files_in(storage) == []


def test_fetch_copies_a_whole_object(storage: LocalStorage, source: Path, tmp_path: Path) -> None:
    stored = storage.write_file("a", source)
    fetch(storage, "a", tmp_path / "copy", stored.sha256)
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_fetch_of_a_damaged_object_leaves_nothing(storage: LocalStorage, source: Path, tmp_path: Path) -> None:
    stored = storage.write_file("a", source)
    damaged = bytearray(CONTENT)
    damaged[CHUNK_BYTES] ^= 1
    storage.path_of("a").write_bytes(damaged)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ObjectDamaged, match="SHA-256"):
        fetch(storage, "a", target / "copy", stored.sha256)
    assert list(target.iterdir()) == []


def test_writers_of_one_key_do_not_mix(storage: LocalStorage) -> None:
    first, second = storage.open_writer("a"), storage.open_writer("a")
    assert isinstance(first, LocalWriter)
    for part in io.BytesIO(b"1" * 100 + b"\n" + b"1" * 100):
        first.write(part)
        second.write(b"2" * len(part))
    second.commit()
    first.commit()
    assert set(content_of(storage, "a").split()) == {b"1" * 100}
