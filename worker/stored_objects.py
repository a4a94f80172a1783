"""Objects that this worker wrote to storage: read back before a row tells of them, and deleted where none came to be."""

import hashlib

from sqlalchemy import select, true

from core.database import Database
from core.errors import Unavailable
from core.logging import get_logger
from core.storage import Check, ObjectDamaged, Storage, StoredObject, discard
from core.tables.exports import ModelExport
from core.tables.files import File
from core.tables.jobs import Checkpoint
from core.tables.models import Model

REFERENCES = (
    (File.storage_key, true()),
    (Model.storage_key, Model.status != "deleted"),
    (ModelExport.storage_key, true()),
    (Checkpoint.storage_key, true()),
)
"""Every column that names an object, and of which rows."""
OBJECT_PREFIXES = ("files", "models", "checkpoints")
"""How the keys of these objects begin."""

log = get_logger(__name__)


def check_stored(storage: Storage, stored: StoredObject, check: Check = lambda: None) -> None:
    """Raises ObjectDamaged unless storage returns the bytes that were written. `check` is called before every chunk and may raise."""
    digest = hashlib.sha256()
    for chunk in storage.read(stored.key):
        check()
        digest.update(chunk)
    if digest.hexdigest() != stored.sha256:
        raise ObjectDamaged(f"{stored.key}: storage returned other bytes than were written")


def referenced(database: Database, keys: list[str]) -> set[str]:
    """Those of the keys that a row names. Raises Unavailable."""
    with database.reading() as session:
        return {key for column, lives in REFERENCES for key in session.scalars(select(column).where(column.in_(keys), lives)) if key is not None}


def delete_unreferenced(database: Database, storage: Storage, keys: list[str]) -> set[str]:
    """Delete objects whose rows were not committed; one that has a row, or may have one, stays. Returns the keys that have none. Where
    storage can't be reached their objects are left to the garbage collection."""
    try:
        unused = set(keys) - referenced(database, keys)
    except Unavailable:
        log.warning("objects_left_without_rows", keys=keys)
        return set()
    for key in unused:
        if not discard(storage, key):
            break  # every try takes long
    return unused
