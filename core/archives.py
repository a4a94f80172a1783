"""Directories as single stored objects: an adapter is a tar.gz, a checkpoint a tar. Built by us, read back by us."""

import gzip
import os
import shutil
import tarfile
from pathlib import Path
from typing import IO

from core.durable_files import rename_durably
from core.ids import new_token
from core.storage import ObjectDamaged, Storage, StoredObject, fetch


def store_directory(storage: Storage, key: str, directory: Path, scratch_dir: Path, compress_level: int = 1) -> StoredObject:
    """Archive the files of `directory` (flat, names sorted, no owner or time, so equal content gives equal bytes) and store
    it under `key`; a key ending in .gz is compressed (level 0: wrapped as gzip, which weights hardly gain by). `scratch_dir` must
    exist and holds the archive while it is written."""
    scratch = scratch_dir / f".{new_token()}.tar"
    try:
        with scratch.open("wb") as file:
            if key.endswith(".gz"):
                with gzip.GzipFile("", "wb", compresslevel=compress_level, fileobj=file, mtime=0) as compressed:  # neither name nor time
                    _write_tar(compressed, directory)
            else:
                _write_tar(file, directory)
        return storage.write_file(key, scratch)
    finally:
        scratch.unlink(missing_ok=True)


def fetch_directory(storage: Storage, key: str, sha256: str, destination: Path) -> Path:
    """The stored directory, unpacked at `destination`, whole or not at all, a power cut included; at once where it is there
    already.

    Raises ObjectDamaged where the archive's hash differs or it can't be unpacked.
    """
    if destination.exists():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    unpacked = destination.parent / f".{destination.name}.{new_token()}"
    archive_path = unpacked.with_name(f"{unpacked.name}.tar")
    try:
        fetch(storage, key, archive_path, sha256)
        unpacked.mkdir()
        with tarfile.open(archive_path) as archive:
            archive.extractall(unpacked, filter="data")
        try:
            rename_durably(unpacked, destination)
        except OSError:
            if not destination.exists():  # else another thread or process was faster, with the same content
                raise
    except tarfile.TarError as error:
        raise ObjectDamaged(f"{key} can't be unpacked: {error}") from error
    finally:
        archive_path.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)
    return destination


def _write_tar(target: IO[bytes] | gzip.GzipFile, directory: Path) -> None:
    with tarfile.open(fileobj=target, mode="w") as archive:
        for path in sorted(directory.iterdir()):
            if not path.is_file() or path.is_symlink():
                raise ValueError(f"{path} is not a plain file; archives hold plain files only")
            entry = tarfile.TarInfo(path.name)
            entry.size = os.stat(path).st_size
            with path.open("rb") as file:
                archive.addfile(entry, file)
