"""What every storage keeps to: files on this machine, and a bucket in a real server."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from core.storage import CHUNK_BYTES, LocalStorage, ObjectDamaged, Storage, copy_into, fetch, verified
from tests.fixtures.s3_server import Bucket

CONTENT = os.urandom(2 * CHUNK_BYTES + 12_345)


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return LocalStorage(tmp_path / "storage")
    return cast(Bucket, request.getfixturevalue("bucket")).storage()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def damage(storage: Storage, request: pytest.FixtureRequest) -> Callable[[str, bytes], None]:
    """Puts other bytes in an object's place."""
    if isinstance(storage, LocalStorage):
        return lambda key, content: cast(None, storage.path_of(key).write_bytes(content))
    return cast(Bucket, request.getfixturevalue("bucket")).replace


def keys_in(storage: Storage, prefix: str = "files") -> list[str]:
    return sorted(listed.key for page in storage.list_objects(prefix) for listed in page)


def content_of(storage: Storage, key: str, *interval: int) -> bytes:
    return b"".join(storage.read(key, *interval))


def test_object_appears_whole_and_only_at_the_commit(storage: Storage) -> None:
    writer = storage.open_writer("files/a")
    for start in range(0, len(CONTENT), 100_000):
        writer.write(CONTENT[start : start + 100_000])
    assert not storage.exists("files/a")
    assert keys_in(storage) == []
    stored = writer.commit()
    assert (stored.key, stored.size_bytes, stored.sha256) == ("files/a", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert content_of(storage, "files/a") == CONTENT
    assert keys_in(storage) == ["files/a"]


def test_empty_object(storage: Storage) -> None:
    stored = storage.open_writer("files/a").commit()
    assert (stored.size_bytes, stored.sha256) == (0, hashlib.sha256().hexdigest())
    assert content_of(storage, "files/a") == b""


def test_commit_replaces_an_older_object(storage: Storage, source: Path) -> None:
    storage.write_file("a", source)
    writer = storage.open_writer("a")
    writer.write(b"new")
    assert content_of(storage, "a") == CONTENT
    writer.commit()
    assert content_of(storage, "a") == b"new"


def test_abort_leaves_nothing_and_may_be_repeated(storage: Storage) -> None:
    writer = storage.open_writer("files/a")
    writer.write(CONTENT)
    writer.abort()
    writer.abort()
    assert not storage.exists("files/a")
    assert keys_in(storage) == []


def test_abort_after_the_commit_keeps_the_object(storage: Storage) -> None:
    writer = storage.open_writer("a")
    writer.write(b"kept")
    writer.commit()
    writer.abort()
    assert content_of(storage, "a") == b"kept"


def test_copying_a_file_that_can_not_be_read_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        storage.write_file("files/a", tmp_path)
    assert keys_in(storage) == []


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, None), (5, None), (0, 1), (7, 7), (CHUNK_BYTES - 1, CHUNK_BYTES + 1), (0, len(CONTENT)), (len(CONTENT) - 1, None), (10, 10**9), (10**9, None)],
)
def test_ranges(storage: Storage, source: Path, start: int, end: int | None) -> None:
    storage.write_file("a", source)
    assert b"".join(storage.read("a", start, end)) == CONTENT[start:end]


def test_reading_streams_in_bounded_chunks(storage: Storage, source: Path) -> None:
    storage.write_file("a", source)
    assert max(len(chunk) for chunk in storage.read("a")) == CHUNK_BYTES


def test_missing_object_fails_before_the_first_byte(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")
    assert not storage.exists("nothing")


def test_delete_is_idempotent(storage: Storage, source: Path) -> None:
    storage.write_file("files/a", source)
    storage.delete("files/a")
    storage.delete("files/a")
    assert not storage.exists("files/a")


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../outside", "", "."])
def test_keys_can_not_leave_the_storage(storage: Storage, source: Path, tmp_path: Path, key: str) -> None:
    for action in (storage.open_writer, storage.read, storage.exists, storage.delete, lambda key: storage.write_file(key, source)):
        with pytest.raises(ValueError, match="leaves the storage directory"):
            action(key)
    assert not (tmp_path / "outside").exists()


def test_listing_gives_what_lies_under_a_prefix(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.storage.LISTED_AT_A_TIME", 2)
    monkeypatch.setattr("core.s3_storage.LISTED_AT_A_TIME", 2)
    for key in ("files/a", "files/b", "files/deep/c", "filesystem", "models/d"):
        writer = storage.open_writer(key)
        writer.write(key.encode())
        writer.commit()
    pages = list(storage.list_objects("files"))
    listed = {each.key: each for page in pages for each in page}
    assert sorted(listed) == ["files/a", "files/b", "files/deep/c"]
    assert max(map(len, pages)) <= 2
    assert listed["files/deep/c"].size_bytes == len("files/deep/c")
    assert abs(listed["files/a"].modified_at - time.time()) < 60
    assert list(storage.list_objects("nothing")) == []


def test_fetch_copies_a_whole_object(storage: Storage, source: Path, tmp_path: Path) -> None:
    stored = storage.write_file("a", source)
    fetch(storage, "a", tmp_path / "copy", stored.sha256)
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_fetch_of_a_damaged_object_leaves_nothing(storage: Storage, source: Path, tmp_path: Path, damage: Callable[[str, bytes], None]) -> None:
    stored = storage.write_file("a", source)
    damaged = bytearray(CONTENT)
    damaged[CHUNK_BYTES] ^= 1
    damage("a", bytes(damaged))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ObjectDamaged, match="SHA-256"):
        fetch(storage, "a", target / "copy", stored.sha256)
    assert list(target.iterdir()) == []


def test_verified_bytes_end_before_the_last_chunk_where_their_hash_is_wrong(storage: Storage, source: Path, damage: Callable[[str, bytes], None]) -> None:
    stored = storage.write_file("a", source)
    assert b"".join(verified(storage.read("a"), "a", stored.sha256)) == CONTENT
    damage("a", CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    chunks = verified(storage.read("a"), "a", stored.sha256)
    assert next(chunks) + next(chunks) == CONTENT[: 2 * CHUNK_BYTES]
    with pytest.raises(ObjectDamaged, match=f"a: its SHA-256 is .* not {stored.sha256}"):
        next(chunks)
    damage("a", CONTENT + b"more")
    with pytest.raises(ObjectDamaged):
        list(verified(storage.read("a"), "a", stored.sha256))


def test_verified_bytes_of_an_empty_object() -> None:
    assert list(verified(iter(()), "a", hashlib.sha256().hexdigest())) == []
    with pytest.raises(ObjectDamaged):
        list(verified(iter(()), "a", "0" * 64))


def test_writers_of_one_key_do_not_mix(storage: Storage) -> None:
    first, second = storage.open_writer("a"), storage.open_writer("a")
    for _ in range(3):
        first.write(b"1" * 100)
        second.write(b"2" * 100)
    second.commit()
    first.commit()
    assert content_of(storage, "a") == b"1" * 300


def test_nothing_is_discarded_of_an_upload_that_is_under_way(storage: Storage) -> None:
    writer = storage.open_writer("a")
    writer.write(b"half")
    assert storage.discard_abandoned_uploads(older_than_seconds=60) == 0
    writer.write(b" and half")
    writer.commit()
    assert content_of(storage, "a") == b"half and half"


def test_copy_into_aborts_what_fails(storage: Storage, tmp_path: Path) -> None:
    writer = storage.open_writer("files/a")
    with pytest.raises(FileNotFoundError):
        copy_into(writer, tmp_path / "missing", lambda: None)
    assert keys_in(storage) == []
