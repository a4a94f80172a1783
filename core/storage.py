"""Objects by key: uploaded files, adapter archives, checkpoints. On local disk here, in a bucket in core.s3_storage; keys are
made by us, never by users.

A write goes to a temporary file that gets its final name when it is complete: an object is whole or absent.

A key is an id, written once and never again, and not the hash of its content: the rows hold the hashes, and every reader
compares. With hashes as keys two rows could share an object, and deleting one row's while another row comes to share it would
leave a row without its bytes: no store can tie the two together.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from core.durable_files import is_disk_away, is_disk_full, make_directory_durably, rename_durably
from core.errors import StorageFull, StorageUnavailable
from core.ids import new_token
from core.logging import get_logger

CHUNK_BYTES = 1 << 20
LISTED_AT_A_TIME = 1000
AWAY = "the disk of the storage directory is away or fails; try again in a moment"

Check = Callable[[], None]

log = get_logger(__name__)


@dataclass(frozen=True)
class StoredObject:
    key: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ListedObject:
    """`modified_at` in unix seconds, by the clock of whoever stores it."""

    key: str
    size_bytes: int
    modified_at: float


class ObjectDamaged(Exception):
    """The bytes in storage are not those that were written."""


class ObjectWriter(Protocol):
    """Collects an object's bytes. Nothing is visible under the key before `commit`."""

    size_bytes: int

    def write(self, chunk: bytes) -> None: ...

    def commit(self) -> StoredObject: ...

    def abort(self) -> None:
        """Idempotent; does nothing after a commit."""
        ...


class Storage(Protocol):
    """Every call may raise StorageUnavailable, also between the chunks of `read`."""

    def open_writer(self, key: str) -> ObjectWriter: ...

    def write_file(self, key: str, path: Path, check: Check = ...) -> StoredObject:
        """`check` is called before every chunk and may raise: nothing is left then."""
        ...

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes from `start` up to, not including, `end`. Raises FileNotFoundError before the first byte."""
        ...

    def exists(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Idempotent."""
        ...

    def list_objects(self, prefix: str) -> Iterator[list[ListedObject]]:
        """All objects whose keys begin with `prefix` and a slash, in pages. Those that come or go meanwhile may be among them."""
        ...

    def discard_abandoned_uploads(self, older_than_seconds: float) -> int:
        """Remove what writers left that were killed before their commit. Returns how many there were."""
        ...


def verified(chunks: Iterator[bytes], key: str, sha256: str) -> Iterator[bytes]:
    """The chunks as they come, but the last one only when all of them together have the hash; ObjectDamaged is raised in its
    place. So whoever counts bytes gets too few of a damaged object."""
    digest = hashlib.sha256()
    held = b""
    for chunk in chunks:
        digest.update(chunk)
        if held:
            yield held
        held = chunk
    if digest.hexdigest() != sha256:
        raise ObjectDamaged(f"{key}: its SHA-256 is {digest.hexdigest()}, not {sha256}")
    if held:
        yield held


def copy_into(writer: ObjectWriter, path: Path, check: Check) -> StoredObject:
    """Write a whole local file and commit it; nothing is left where that fails. `check` is called before every chunk and may raise."""
    try:
        with path.open("rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                check()
                writer.write(chunk)
        return writer.commit()
    except BaseException:
        writer.abort()
        raise


def discard(storage: Storage, key: str) -> bool:
    """Delete an object that no row needs. Where storage can't be reached it is left to the worker's garbage collection, and this
    returns False."""
    try:
        storage.delete(key)
    except StorageUnavailable as error:
        log.warning("object_not_deleted", key=key, error=error.message)
        return False
    return True


def fetch(storage: Storage, key: str, path: Path, sha256: str, check: Check = lambda: None) -> None:
    """Copy an object to a local file, whole or not at all. `check` is called before every chunk and may raise. Raises ObjectDamaged
    where the hash differs."""
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.{new_token()}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in storage.read(key):
                check()
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise ObjectDamaged(f"{key}: its SHA-256 is {digest.hexdigest()}, not {sha256}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class LocalStorage:
    """Files under one directory of this machine (or of a disk that all machines mount); a key is the path in it.

    A disk that is not mounted looks like an empty one. That the directory for temporary files is missing tells them apart.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.temporary_dir = self.root / ".tmp"
        self.temporary_dir.mkdir(parents=True, exist_ok=True)

    def path_of(self, key: str) -> Path:
        path = (self.root / key).resolve()
        if not path.is_relative_to(self.root) or path == self.root:
            raise ValueError(f"storage key leaves the storage directory: {key!r}")
        return path

    def open_writer(self, key: str) -> "LocalWriter":
        self._require_disk()
        return LocalWriter(key, self.path_of(key), self.temporary_dir / new_token())

    def write_file(self, key: str, path: Path, check: Check = lambda: None) -> StoredObject:
        return copy_into(self.open_writer(key), path, check)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with _disk_errors():
            try:
                file = self.path_of(key).open("rb")
            except FileNotFoundError:
                self._require_disk()
                raise
        return _read_range(file, start, end)

    def exists(self, key: str) -> bool:
        self._require_disk()
        return self.path_of(key).is_file()

    def delete(self, key: str) -> None:
        self._require_disk()
        with _disk_errors():
            self.path_of(key).unlink(missing_ok=True)

    def list_objects(self, prefix: str) -> Iterator[list[ListedObject]]:
        self._require_disk()
        page: list[ListedObject] = []
        for directory, _, names in os.walk(self.path_of(prefix)):
            for path in (Path(directory, name) for name in names):
                try:
                    status = path.stat()
                except FileNotFoundError:  # deleted meanwhile
                    continue
                page.append(ListedObject(str(path.relative_to(self.root)), status.st_size, status.st_mtime))
                if len(page) == LISTED_AT_A_TIME:
                    yield page
                    page = []
        if page:
            yield page

    def discard_abandoned_uploads(self, older_than_seconds: float) -> int:
        self._require_disk()
        before = time.time() - older_than_seconds
        discarded = 0
        for path in self.temporary_dir.iterdir():
            with suppress(FileNotFoundError):  # committed, or removed by another worker
                if path.stat().st_mtime < before:
                    path.unlink()
                    discarded += 1
        return discarded

    def _require_disk(self) -> None:
        """Raises StorageUnavailable."""
        with _disk_errors():
            try:
                self.temporary_dir.stat()
            except FileNotFoundError as error:
                raise StorageUnavailable(AWAY) from error


def _read_range(file: BinaryIO, start: int, end: int | None) -> Iterator[bytes]:
    with file as opened:
        opened.seek(start)
        left = None if end is None else end - start
        while left is None or left > 0:
            with _disk_errors():
                chunk = opened.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
            if not chunk:
                return
            left = None if left is None else left - len(chunk)
            yield chunk


class LocalWriter:
    def __init__(self, key: str, path: Path, temporary: Path) -> None:
        self.key = key
        self.size_bytes = 0
        self._path = path
        self._temporary = temporary
        self._digest = hashlib.sha256()
        with _disk_errors():
            self._file = temporary.open("xb")

    def write(self, chunk: bytes) -> None:
        with _disk_errors():
            self._file.write(chunk)
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    def commit(self) -> StoredObject:
        with _disk_errors():
            self._file.close()
            try:
                self._temporary.stat()  # before a directory is made where the disk was mounted
                make_directory_durably(self._path.parent)
                rename_durably(self._temporary, self._path)
            except FileNotFoundError as error:  # nobody else removes it so soon
                raise StorageUnavailable(AWAY) from error
        return StoredObject(self.key, self.size_bytes, self._digest.hexdigest())

    def abort(self) -> None:
        """Idempotent; does nothing after a commit."""
        with _ignoring_the_disk():
            self._file.close()
        with _ignoring_the_disk():
            self._temporary.unlink(missing_ok=True)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Those that say something of the disk, and not of one object, as errors of the service."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise StorageFull("the server's storage is full; nothing was stored") from error
        if is_disk_away(error):
            log.warning("storage_disk_failed", error=str(error))
            raise StorageUnavailable(AWAY) from error
        raise


@contextmanager
def _ignoring_the_disk() -> Iterator[None]:
    """Closing flushes: on a full disk that fails again, and the file is thrown away anyway. From one that is away the worker's garbage
    collection removes it later."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error) and not is_disk_away(error):
            raise
