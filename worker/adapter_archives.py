"""What a trained adapter is in storage: a tar.gz of PEFT's two files and the attestation that a server must reproduce."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from sqlalchemy import select

from core.archives import store_directory
from core.database import Database
from core.errors import Unavailable
from core.logging import get_logger
from core.storage import ObjectDamaged, Storage, StoredObject
from core.tables.files import File
from core.tables.jobs import Checkpoint
from core.tables.models import Model

ATTESTATION_NAME = "attestation.json"
WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_FILES = ("adapter_config.json", WEIGHTS_NAME, ATTESTATION_NAME)
MANIFEST_NAME = "manifest.json"

log = get_logger(__name__)


def check_manifest(directory: Path) -> None:
    """Raises ObjectDamaged unless every file that the trainer wrote there still has its hash."""
    try:
        manifest: dict[str, str] = json.loads((directory / MANIFEST_NAME).read_text())
        wrong = [name for name, digest in manifest.items() if file_sha256(directory / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        raise ObjectDamaged(f"{directory.name} is incomplete: {error}") from error
    if wrong:
        raise ObjectDamaged(f"{directory.name}: {wrong[0]} does not have the hash that was recorded")


def store_adapter(storage: Storage, serving_name: str, directory: Path, scratch_dir: Path) -> StoredObject:
    """Store the adapter in `directory` (a checkpoint or a final one) and read it back.

    Raises ObjectDamaged where storage returns other bytes, StorageFull where it is full.
    """
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=scratch_dir) as scratch:
        for name in ADAPTER_FILES:
            shutil.copyfile(directory / name, Path(scratch) / name)
        stored = store_directory(storage, f"models/{serving_name}.tar.gz", Path(scratch), scratch_dir)
    check_stored(storage, stored)
    return stored


def check_stored(storage: Storage, stored: StoredObject) -> None:
    """Raises ObjectDamaged unless storage returns the bytes that were written."""
    digest = hashlib.sha256()
    for chunk in storage.read(stored.key):
        digest.update(chunk)
    if digest.hexdigest() != stored.sha256:
        raise ObjectDamaged(f"{stored.key}: storage returned other bytes than were written")


def delete_unreferenced(database: Database, storage: Storage, keys: list[str]) -> set[str]:
    """Delete objects whose rows were not committed; one that has a row, or may have one, stays. Returns the deleted keys."""
    try:
        with database.reading() as session:
            columns = (Model.storage_key, Checkpoint.storage_key, File.storage_key)
            used = {key for column in columns for key in session.scalars(select(column).where(column.in_(keys)))}
    except Unavailable:
        log.warning("objects_left_without_rows", keys=keys)
        return set()
    unused = set(keys) - used
    for key in unused:
        storage.delete(key)
    return unused


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
