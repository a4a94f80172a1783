import errno
import io
import os
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.archives import fetch_directory, store_directory, stream_directory
from core.errors import StorageFull
from core.storage import LocalStorage, ObjectDamaged, StoredObject

FILES = {"adapter_config.json": b'{"r": 16}', "adapter_model.safetensors": bytes(range(256)) * 4096, "empty": b""}


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture
def scratch_dir(tmp_path: Path) -> Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def store_bytes(storage: LocalStorage, key: str, content: bytes) -> StoredObject:
    writer = storage.open_writer(key)
    writer.write(content)
    return writer.commit()


@pytest.mark.parametrize("key", ["a.tar", "a.tar.gz"])
def test_round_trip(storage: LocalStorage, directory: Path, scratch_dir: Path, tmp_path: Path, key: str) -> None:
    stored = store_directory(storage, key, directory, scratch_dir)
    fetched = fetch_directory(storage, key, stored.sha256, tmp_path / "deep" / "copy")
    assert files_of(fetched) == FILES
    assert list(scratch_dir.iterdir()) == []
    assert [path.name for path in fetched.parent.iterdir()] == ["copy"]


def test_gz_is_compressed_and_opens_with_any_tar(storage: LocalStorage, directory: Path, scratch_dir: Path) -> None:
    plain, compressed = (store_directory(storage, key, directory, scratch_dir) for key in ("a.tar", "a.tar.gz"))
    assert compressed.size_bytes < plain.size_bytes / 10
    with tarfile.open(storage.path_of("a.tar.gz"), "r:gz") as archive:
        assert archive.getnames() == sorted(FILES)


@pytest.mark.parametrize("key", ["a.tar", "a.tar.gz"])
def test_equal_content_gives_equal_bytes_at_any_time(storage: LocalStorage, directory: Path, scratch_dir: Path, tmp_path: Path, key: str) -> None:
    first = store_directory(storage, key, directory, scratch_dir)
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    for name in reversed(list(FILES)):
        (other / name).write_bytes(FILES[name])
        (other / name).chmod(0o600)
        os.utime(other / name, (1, 1))
    time.sleep(1.1)  # gzip's header has room for the time, in seconds
    assert store_directory(storage, key, other, scratch_dir).sha256 == first.sha256


def test_a_streamed_archive_holds_the_same_and_leaves_no_copy_behind(storage: LocalStorage, directory: Path, tmp_path: Path) -> None:
    stored = stream_directory(storage, "a.tar.gz", directory)
    assert stored.size_bytes > sum(map(len, FILES.values())), "not compressed"
    assert stream_directory(storage, "b.tar.gz", directory).sha256 == stored.sha256
    assert files_of(fetch_directory(storage, "a.tar.gz", stored.sha256, tmp_path / "copy")) == FILES
    with tarfile.open(storage.path_of("a.tar.gz"), "r:gz") as archive:
        assert archive.getnames() == sorted(FILES)
    assert list(storage.temporary_dir.iterdir()) == []


class Stopped(Exception):
    pass


class StopAtCall:
    """A `check` that raises when it is called for the nth time."""

    def __init__(self, call: int) -> None:
        self.calls = 0
        self._last = call

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self._last:
            raise Stopped


@pytest.mark.parametrize("call", [1, 4])
def test_streaming_can_be_stopped_at_any_chunk_and_leaves_nothing(storage: LocalStorage, directory: Path, call: int) -> None:
    (directory / "large").write_bytes(bytes(5 << 20))
    check = StopAtCall(call)
    with pytest.raises(Stopped):
        stream_directory(storage, "a.tar.gz", directory, check)
    assert check.calls == call
    assert not storage.exists("a.tar.gz")
    assert list(storage.temporary_dir.iterdir()) == []


@pytest.mark.parametrize("call", [1, 4, 12], ids=["first chunk", "archiving", "storing"])
def test_storing_can_be_stopped_at_any_chunk_and_leaves_nothing(storage: LocalStorage, directory: Path, scratch_dir: Path, call: int) -> None:
    (directory / "large").write_bytes(bytes(5 << 20))
    check = StopAtCall(call)
    with pytest.raises(Stopped):
        store_directory(storage, "a.tar", directory, scratch_dir, check)
    assert check.calls == call
    assert not storage.exists("a.tar")
    assert [*storage.temporary_dir.iterdir(), *scratch_dir.iterdir()] == []


@pytest.mark.parametrize("call", [1, 4, 7, 20], ids=["first chunk", "fetching", "unpacking begins", "unpacking"])
def test_fetching_can_be_stopped_at_any_chunk_and_leaves_nothing(storage: LocalStorage, directory: Path, tmp_path: Path, call: int) -> None:
    (directory / "large").write_bytes(bytes(4 << 20))
    stored = stream_directory(storage, "a.tar.gz", directory)  # of about five chunks
    check = StopAtCall(call)
    with pytest.raises(Stopped):
        fetch_directory(storage, "a.tar.gz", stored.sha256, tmp_path / "target" / "copy", check)
    assert check.calls == call
    assert list((tmp_path / "target").iterdir()) == []


def test_fetching_on_a_full_disk_is_said_and_leaves_nothing(
    storage: LocalStorage, directory: Path, scratch_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store_directory(storage, "adapters/1.tar.gz", directory, scratch_dir)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for where in ("tarfile.TarFile.extractall", "core.archives.rename_durably", "pathlib.Path.open"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(StorageFull):
                fetch_directory(storage, stored.key, stored.sha256, tmp_path / "there" / "1")
        assert list((tmp_path / "there").iterdir()) == [], where


def test_only_plain_files_are_archived(storage: LocalStorage, directory: Path, scratch_dir: Path) -> None:
    (directory / "secret").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="not a plain file"):
        store_directory(storage, "a.tar", directory, scratch_dir)
    assert not storage.exists("a.tar")
    assert list(scratch_dir.iterdir()) == []


@pytest.mark.parametrize("key", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("damage", ["one bit", "truncated"])
def test_damaged_archive_is_noticed_and_leaves_nothing(
    storage: LocalStorage, directory: Path, scratch_dir: Path, tmp_path: Path, key: str, damage: str
) -> None:
    stored = store_directory(storage, key, directory, scratch_dir)
    content = bytearray(storage.path_of(key).read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    else:
        del content[-1:]
    storage.path_of(key).write_bytes(content)
    target = tmp_path / "target"
    with pytest.raises(ObjectDamaged):
        fetch_directory(storage, key, stored.sha256, target / "copy")
    assert list(target.iterdir()) == []


def test_object_that_is_no_archive(storage: LocalStorage, tmp_path: Path) -> None:
    stored = store_bytes(storage, "a.tar", b"not a tar")
    with pytest.raises(ObjectDamaged, match="can't be unpacked"):
        fetch_directory(storage, "a.tar", stored.sha256, tmp_path / "target" / "copy")
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside-of-the-archive"])
def test_archive_can_not_write_outside_its_directory(storage: LocalStorage, tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"evil"))
    stored = store_bytes(storage, "a.tar", buffer.getvalue())
    target = tmp_path / "target"
    if name.startswith("/"):  # unpacked below the directory, without its leading slash
        fetch_directory(storage, "a.tar", stored.sha256, target / "copy")
        assert not Path(name).exists()
    else:
        with pytest.raises(ObjectDamaged):
            fetch_directory(storage, "a.tar", stored.sha256, target / "copy")
        assert list(target.iterdir()) == []


def test_what_is_there_already_is_not_fetched_again(storage: LocalStorage, directory: Path, scratch_dir: Path, tmp_path: Path) -> None:
    stored = store_directory(storage, "a.tar", directory, scratch_dir)
    fetch_directory(storage, "a.tar", stored.sha256, tmp_path / "copy")
    storage.delete("a.tar")
    assert files_of(fetch_directory(storage, "a.tar", stored.sha256, tmp_path / "copy")) == FILES


def test_threads_that_fetch_the_same_archive_all_get_it_whole(storage: LocalStorage, directory: Path, scratch_dir: Path, tmp_path: Path) -> None:
    stored = store_directory(storage, "a.tar.gz", directory, scratch_dir)
    for attempt in range(10):
        destination = tmp_path / f"target-{attempt}" / "copy"
        barrier = threading.Barrier(4)

        def fetch_and_look(_: int, destination: Path = destination, barrier: threading.Barrier = barrier) -> dict[str, bytes]:
            barrier.wait(30)
            return files_of(fetch_directory(storage, "a.tar.gz", stored.sha256, destination))

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(fetch_and_look, range(4))) == [FILES] * 4
        assert [path.name for path in destination.parent.iterdir()] == ["copy"]


def test_what_a_later_call_takes_as_it_is_outlasts_a_power_cut(
    storage: LocalStorage, directory: Path, scratch_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store_directory(storage, "a.tar", directory, scratch_dir)
    on_disk: set[str] = set()
    at_the_rename: list[set[str]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        on_disk.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        if target == tmp_path / "copy":
            at_the_rename.append(set(on_disk))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    fetch_directory(storage, "a.tar", stored.sha256, tmp_path / "copy")
    (named,) = at_the_rename
    assert set(FILES) <= named
