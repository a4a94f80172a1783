"""To whom a storage belongs: objects without rows may only be removed by the database whose rows they could have.

A database that is new, or another service's, holds no row of anything in the storage that it was given by mistake, and would call
all of it garbage. So the storage names a project of its database, and whoever doesn't have that project removes nothing.
"""

from sqlalchemy import select

from core.logging import get_logger
from core.tables.projects import Project
from worker.resources import Resources
from worker.stored_objects import OBJECT_PREFIXES, referenced

OWNER_KEY = "owner"
"""The object that holds the id of a project."""

log = get_logger(__name__)


def database_owns_storage(resources: Resources) -> bool:
    """Where no owner is named yet, this database becomes it, if it knows some of the objects, or if there are none."""
    owner = _owner(resources)
    with resources.database.reading() as session:
        if owner is not None:
            return session.get(Project, owner) is not None
        oldest = session.scalar(select(Project.id).order_by(Project.created_at, Project.id).limit(1))
    if oldest is None or not _knows_its_objects(resources):
        return False
    writer = resources.storage.open_writer(OWNER_KEY)
    try:
        writer.write(oldest.encode())
        writer.commit()
    finally:
        writer.abort()
    log.info("storage_owner_named", project=oldest)
    return _owner(resources) == oldest  # another database may have been as fast


def _owner(resources: Resources) -> str | None:
    try:
        return b"".join(resources.storage.read(OWNER_KEY)).decode()
    except FileNotFoundError:
        return None


def _knows_its_objects(resources: Resources) -> bool:
    """Looks at the first page of each kind."""
    found = [listed.key for prefix in OBJECT_PREFIXES for listed in next(resources.storage.list_objects(prefix), [])]
    return not found or bool(referenced(resources.database, found))
