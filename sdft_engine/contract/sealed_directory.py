"""Directories that the trainer leaves and the worker takes: complete under their final name, or absent.

Written under a temporary name, sealed (a manifest with the SHA-256 of every file, everything fsync'd), then renamed.
Torch-free.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdft_engine.contract.errors import CheckpointDamaged, DiskFull
from sdft_engine.contract.run_directory import sync_directory

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
"""PEFT's names."""
ATTESTATION_NAME = "attestation.json"
MANIFEST_NAME = "manifest.json"


@contextmanager
def sealed_directory(directory: Path) -> Iterator[Path]:
    """A temporary directory to write into; at the end of the block it is sealed and takes the place of `directory`.

    Raises DiskFull. Where the block or the sealing fails, nothing is left and an earlier `directory` stays.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        seal(temporary)
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
        sync_directory(directory.parent)
    except Exception as error:  # safetensors reports a full disk with an exception of its own
        if is_disk_full(error):
            raise DiskFull(f"the disk is full: {directory.name} could not be written; free space and start the job again") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def verify(directory: Path) -> None:
    """Raises CheckpointDamaged unless every file of a sealed directory is there with its hash, and no other."""
    try:
        manifest: dict[str, str] = json.loads((directory / MANIFEST_NAME).read_text())
        wrong = [name for name, digest in manifest.items() if file_sha256(directory / name) != digest]
        unlisted = sorted({path.name for path in directory.iterdir()} - manifest.keys() - {MANIFEST_NAME})
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointDamaged(f"{directory.name} is incomplete: {error}") from error
    if unlisted or not manifest:
        raise CheckpointDamaged(f"{directory.name}: {MANIFEST_NAME} does not list {unlisted[0] if unlisted else 'anything'}")
    if wrong:
        raise CheckpointDamaged(f"{directory.name}: {wrong[0]} does not have the hash that was recorded")


def is_disk_full(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in str(error)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_files(directory: Path) -> None:
    """fsync every file of a flat directory, and the directory."""
    for path in directory.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def seal(directory: Path) -> None:
    """Write the manifest and fsync everything."""
    manifest = {path.name: file_sha256(path) for path in sorted(directory.iterdir())}
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))
    sync_files(directory)
