"""Directories as single stored objects: an adapter is a tar.gz, a checkpoint a tar. Built by us, read back by us.

Where a function takes `check`, it is called before every chunk and may raise: nothing is left then. With it a worker that ends
is not held up by a large object.
"""

import gzip
import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import IO

from core.durable_files import is_disk_full, rename_durably
from core.errors import StorageFull
from core.ids import new_token
from core.storage import CHUNK_BYTES, Check, ObjectDamaged, ObjectWriter, Storage, StoredObject, fetch


def store_directory(storage: Storage, key: str, directory: Path, scratch_dir: Path, check: Check = lambda: None) -> StoredObject:
    """Archive the files of `directory` (flat, names sorted, no owner or time, so equal content gives equal bytes) and store
    it under `key`; a key ending in .gz is compressed. `scratch_dir` must exist and holds the archive while it is written."""
    scratch = scratch_dir / f".{new_token()}.tar"
    try:
        with scratch.open("wb") as file:
            if key.endswith(".gz"):
                with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as compressed:  # neither name nor time
                    _write_tar(compressed, directory, check)
            else:
                _write_tar(file, directory, check)
        return storage.write_file(key, scratch, check)
    finally:
        scratch.unlink(missing_ok=True)


def stream_directory(storage: Storage, key: str, directory: Path, check: Check = lambda: None) -> StoredObject:
    """The same for a directory as large as a whole model: written straight into storage, without a second copy on this machine's
    disk, and wrapped as gzip uncompressed, because weights hardly gain by that."""
    writer = storage.open_writer(key)
    try:
        with gzip.GzipFile("", "wb", compresslevel=0, fileobj=_WriterFile(writer), mtime=0) as wrapped:
            _write_tar(wrapped, directory, check)
        return writer.commit()
    except BaseException:
        writer.abort()
        raise


def fetch_directory(storage: Storage, key: str, sha256: str, destination: Path, check: Check = lambda: None) -> Path:
    """The stored directory, unpacked at `destination`, whole or not at all, a power cut included; at once where it is there
    already.

    Raises ObjectDamaged where the archive's hash differs or it can't be unpacked, StorageFull where this machine's disk is full.
    """
    if destination.exists():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    unpacked = destination.parent / f".{destination.name}.{new_token()}"
    archive_path = unpacked.with_name(f"{unpacked.name}.tar")
    try:
        fetch(storage, key, archive_path, sha256, check)
        unpacked.mkdir()
        with _CheckedFile(archive_path, check) as file, tarfile.open(fileobj=file) as archive:
            archive.extractall(unpacked, filter="data")
        try:
            rename_durably(unpacked, destination)
        except OSError:
            if not destination.exists():  # else another thread or process was faster, with the same content
                raise
    except OSError as error:
        if is_disk_full(error):
            raise StorageFull("the disk is full here: what is stored can't be unpacked") from error
        raise
    except tarfile.TarError as error:
        raise ObjectDamaged(f"{key} can't be unpacked: {error}") from error
    finally:
        archive_path.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)
    return destination


def _write_tar(target: IO[bytes] | gzip.GzipFile, directory: Path, check: Check = lambda: None) -> None:
    with tarfile.TarFile(fileobj=target, mode="w", copybufsize=CHUNK_BYTES) as archive:
        for path in sorted(directory.iterdir()):
            if not path.is_file() or path.is_symlink():
                raise ValueError(f"{path} is not a plain file; archives hold plain files only")
            entry = tarfile.TarInfo(path.name)
            entry.size = os.stat(path).st_size
            with _CheckedFile(path, check) as file:
                archive.addfile(entry, file)


class _CheckedFile(io.BufferedReader):
    """A file open for reading that calls `check` before every read."""

    def __init__(self, path: Path, check: Check) -> None:
        super().__init__(io.FileIO(path))
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(size)


class _WriterFile(io.RawIOBase):
    """An object's writer where a file is expected."""

    def __init__(self, writer: ObjectWriter) -> None:
        self._writer = writer

    def write(self, chunk: bytes) -> int:  # type: ignore[override]
        self._writer.write(chunk)
        return len(chunk)
